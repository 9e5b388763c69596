r"""
Try models: prompt in, text out, printed as it is generated; several models side by side.

    python sample.py --model=models/llama2-7b --prompt='Once upon a time'
    python sample.py --model=models/llama2-7b --adapter=out/gsm8k/step_200 --prompt='Q: ...\nA:'
    python sample.py --model=models/llama2-7b --adapter=none,out/r16/step_200,out/r64/step_200 < q
    python sample.py --model=out/full/step_200,out/r16/step_200 --chat=True    # a message per line

    'Once upon a time'  ->  [1, 403, 407, 261, 378]  ->  [432, 383, 286, ...]  ->  ', there was ...'
"""
import shutil
import sys
import time

from configurator import configure
from evaluation.evals import begin_and_end, load_for_eval
from llama.generate import check_numbers
from runtime import one_line_errors, pick_device, pick_dtype
from text.chat import chat_encoder
from text.columns import column_width, print_alone, print_row, print_side_by_side
from text.records import unescape
from text.templates import CHATS
from text.tokenizer import StreamDecoder, text_stopper

# -----------------------------------------------------------------------------
model = ()               # folders of models, checkpoints, or adapters that name their base
adapter = ()             # adapter folders to put on the one `model`; none = the model itself
tokenizer = ''           # tokenizer file or folder; '' = the model's folder
prompt = ''              # text; \n, \t and \\ as in templates; '' = standard input
chat = False             # the prompt, then each line of standard input, is a message
template = ''            # for chat: tulu | llama2; '' = the one in the model's folder
system = ''              # for chat: a system message
bos = None               # whether to start with BOS; None = as the tokenizer does
max_new_tokens = 256
temperature = 0.0        # 0 = greedy
top_p = 1.0              # keep the likeliest tokens up to this share
n = 1                    # continuations of the prompt
seed = 1337
stop = ()                # texts that end a continuation, with the prompt's escapes
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_types = {'bos': bool}
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64'),
            'template': ('', *CHATS)}


# ----------------------------------------------------------------------------- models
def pairs_of(models, adapters):
    """[(model, adapter or "")] to compare; ValueError for adapters on several models."""
    if not adapters:
        return [(each, "") for each in models or ("",)]
    if len(models) > 1:
        raise ValueError("adapter: they go on one model; list several models or adapters in model")
    base = models[0] if models else ""
    return [(base, "" if each == "none" else each) for each in adapters]


def answer_of(subject, ids, stop_texts, most, drawing):
    """Yield the text with which a Subject's model continues `ids`, a piece per new id.

    most: limit on new ids; drawing: sampling arguments of generate_tokens."""
    tok = subject.tokenizer
    decoder = StreamDecoder(tok, ids)
    ended = text_stopper(tok, stop_texts, tok.stop_ids)
    tokens = subject.model.generate_tokens([ids], most, stop=ended, vocab_size=tok.vocab_size,
                                           **drawing)
    for _, _, token, _ in tokens:
        yield "" if token in tok.stop_ids else decoder.push(token)
    yield decoder.finish()


def room_for(subject, ids, most):
    """How many new ids fit after a text, at most `most`; ValueError if none do."""
    context = subject.model.config.max_position_embeddings
    if len(ids) >= context:
        raise ValueError(f"the text has {len(ids)} tokens, the model's context {context}")
    room = context - len(ids)
    if room < most:
        print(f"[at most {room} new tokens, as the model's context is {context}]", file=sys.stderr)
    return min(most, room)


def messages_in(prompt, lines):
    """Yield the prompt, if there is one, then each line that is not blank."""
    if prompt:
        yield prompt
    for line in lines:
        if line.strip():
            yield line.rstrip("\n")


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        pairs = pairs_of(model, adapter)
        if chat and n > 1:
            raise ValueError("n: a conversation has one answer to each message; say n=1")
        own_template = chat and not template
        if own_template and bos is not None:
            raise ValueError("bos: a model's own chat template says whether it stands in front")
        check_numbers(1, temperature, top_p, n, [max_new_tokens])
        width = column_width(shutil.get_terminal_size().columns, len(pairs))

        # the models; stderr says how a text begins and ends, stdout has only the texts
        device = pick_device(device)
        subjects = []
        begins = []
        encoders = []
        for folder, put_on in pairs:
            subject = load_for_eval(folder, put_on, device, pick_dtype(dtype, device), tokenizer)
            tok = subject.tokenizer
            begins.append(tok.adds_bos if bos is None else bos)
            if chat:
                # an adapter's folder may have a template of its own
                of_model = [subject.identity["adapter"], subject.identity["model"]]
                places = [tokenizer] if tokenizer else list(filter(None, of_model))
                encoders.append(chat_encoder(tok, places, template, begins[-1]))
            how = "its own chat template" if own_template else begin_and_end(tok, begins[-1])
            print(f"[{put_on or folder}: {how}]", file=sys.stderr)
            subjects.append(subject)

        # one prompt n times, or one message after another
        if chat:
            rounds = messages_in(unescape(prompt), sys.stdin)
        else:
            rounds = [unescape(prompt) if prompt else sys.stdin.read()] * n
        stop_texts = [unescape(end) for end in stop]
        conversations = [[("system", system)] if system else [] for _ in subjects]
        count = 0
        started = time.perf_counter()
        for number, text in enumerate(rounds):
            drawing = {"temperature": temperature, "top_p": top_p, "seed": seed + number}
            answers = []
            for i, subject in enumerate(subjects):
                if chat:
                    conversations[i].append(("user", text))
                    ids = encoders[i](conversations[i])
                else:
                    ids = subject.tokenizer.encode(text, bos=begins[i])
                most = room_for(subject, ids, max_new_tokens)
                answers.append(answer_of(subject, ids, stop_texts, most, drawing))

            # a blank line between rounds; a single continuation follows its prompt
            if number:
                print()
            if not chat:
                print(text, end="" if len(answers) == 1 else "\n\n", flush=True)
            if len(answers) == 1:
                texts, pieces = print_alone(answers[0])
            else:
                print_row([str(put_on or folder)[-width:] for folder, put_on in pairs], width)
                texts, pieces = print_side_by_side(answers, width)
            count += pieces - len(subjects)  # each answer ends with a piece that is not a token
            for conversation, said in zip(conversations, texts):
                conversation.append(("assistant", said))
        seconds = time.perf_counter() - started
        print(f"[{count} tokens, {count / seconds:.1f} a second]", file=sys.stderr)
