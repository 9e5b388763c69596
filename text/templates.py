r"""
Templates: the texts of a record, in order, as what is only read and what is learned.

    template='Question: {question}\nAnswer:', response_field='answer'
    {"question": "2+2?", "answer": "4"}     ->  [("Question: 2+2?\nAnswer:", "4")]

    template='tulu'
    {"messages": [user Hi, assistant Hello, user Bye, assistant See you]}
        ->  [("<|user|>\nHi\n<|assistant|>\n", "Hello"),
             ("\n<|user|>\nBye\n<|assistant|>\n", "See you")]

To add one, put a text around {prompt} into TEMPLATES, or a function of messages into CHATS.
"""
import string

from text.records import text_of, unescape

# What the authors of these datasets put around {prompt}; which one the paper trained with is not
# known, its evals have none.
TEMPLATES = {
    "none": "{prompt}",
    "alpaca": "Below is an instruction that describes a task. "
              "Write a response that appropriately completes the request."
              "\n\n### Instruction:\n{prompt}\n\n### Response:",
    "magicoder": "You are an exceptionally intelligent coding assistant that consistently delivers "
                 "accurate and reliable responses to user instructions."
                 "\n\n@@ Instruction\n{prompt}\n\n@@ Response\n"}


def tulu_turns(messages):
    """Messages [(role, content)] -> [(what is read, response)] in Tulu's form."""
    # read gathers all messages before a response
    turns = []
    read = ""
    for role, content in messages:
        if role == "assistant":
            turns.append((read + "<|assistant|>\n", content.strip()))
            read = "\n"  # after the EOS of the response
        else:
            read += f"<|{role}|>\n{content.strip()}\n"
    return turns


def llama2_turns(messages):
    """The same in the form of Llama-2-chat: blanks around a response, BOS before each turn."""
    turns = []
    read = ""
    system = ""
    for role, content in messages:
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            read = f"[INST] {(system + content).strip()} [/INST]"
            system = ""
        else:
            # an empty response stays empty, so that it is dropped
            response = content.strip()
            if response:
                response = f" {response} "
            turns.append((read, response))
    return turns


# by the name that --template gives
CHATS = {"tulu": tulu_turns, "llama2": llama2_turns}
OWN = "chat_template"  # the one in the tokenizer's folder, see text/chat.py
OF_MESSAGES = (OWN, *CHATS)


def read_template(template, prompt_field):
    """
    A template's name, or a text of the user's -> (format string, {name in it: field of a record}).

    '' has no prompt at all. ValueError if it is not one over named fields.
    """
    if template == "":
        return "", {}
    if template in TEMPLATES:
        return TEMPLATES[template], {"prompt": prompt_field}
    # a text of the user's: fields is empty where it has none, or cannot be filled in
    text = unescape(template)
    try:
        parts = string.Formatter().parse(text)
        fields = [name for _, name, _, _ in parts if name is not None]
        text.format_map(dict.fromkeys(fields, ""))
    except (ValueError, LookupError, AttributeError, TypeError):
        fields = []
    if not fields or "" in fields:
        known = ", ".join([*TEMPLATES, *OF_MESSAGES])
        raise ValueError(f"template: expected {known}, or a text with fields such as {{question}} "
                         f"and other braces doubled; found {template!r}")
    return text, dict(zip(fields, fields))


def fields_of(job):
    """
    The fields of a record that are read; sets job.template_text and job.template_fields.

    ValueError for a template that does not go with the other knobs.
    """
    if job.template in OF_MESSAGES:
        if job.messages_field:
            return [job.messages_field]
        return [job.prompt_field, job.response_field]
    prompt = job.text_field if job.kind == "cpt" else job.prompt_field
    job.template_text, job.template_fields = read_template(job.template, prompt)
    if job.kind == "cpt":
        return list(job.template_fields.values())
    # the user's own text may have a {prompt} as well
    if "prompt" in job.template_fields:
        job.template_fields["prompt"] = job.prompt_field
    fields = list(job.template_fields.values())
    if job.prompt_field not in ("prompt", *fields):
        raise ValueError(f"prompt_field: no {{prompt}} in template={job.template!r}")
    if job.response_field in fields:
        raise ValueError(f"template: it holds {{{job.response_field}}}, the response_field")
    return [*fields, job.response_field]


def turns_of(record, job):
    """
    A record -> [(what is only read, what is learned)]: one pair, of a chat one a response, of cpt
    [("", document)]. ValueError says which field is missing or wrong.
    """
    if job.template in OF_MESSAGES:
        if job.messages_field:
            messages = messages_of(record, job.messages_field)
        else:
            prompt = text_of(record, job.prompt_field)
            messages = [("user", prompt), ("assistant", text_of(record, job.response_field))]
        if job.chat:
            return job.chat.turns(messages, learn_all=job.train_on_turns == "all")
        return CHATS[job.template](messages)
    # the prompt or document, as the template has it
    values = {}
    for name, field in job.template_fields.items():
        if isinstance(record, dict) and field not in record and job.messages_field in record:
            raise ValueError(f"expected a field {field!r}; for the chat in {job.messages_field!r} "
                             f"say --template={' or '.join(OF_MESSAGES)}")
        values[name] = text_of(record, field)
    text = job.template_text.format_map(values)
    if job.kind == "cpt":
        return [("", text)]
    # an empty response stays empty, so that it is dropped
    response = text_of(record, job.response_field)
    if response:
        response = job.response_prefix + response
    return [(text, response)]


def messages_of(record, name):
    """
    The conversation in one field of a record, [(role, content)].

    ValueError unless system comes first or not at all, then user and assistant in turn, with a
    response at the end: Llama-2's template and llm-foundry refuse other orders as well.
    """
    messages = record.get(name) if isinstance(record, dict) else None
    # a column of roles and one of contents, as datasets stores a sequence of objects
    if isinstance(messages, dict) and isinstance(messages.get("role"), list):
        messages = rows_of_columns(messages, name)
    if not isinstance(messages, list):
        text_of(record, name)  # says what is wrong
        raise ValueError(f"expected a list of messages in field {name!r}, found text")
    pairs = [(text_of(message, "role"), text_of(message, "content")) for message in messages]
    roles = [role for role, _ in pairs]

    # the order of roles
    first = 1 if roles[:1] == ["system"] else 0
    for number, role in enumerate(roles[first:]):
        if role != ("user", "assistant")[number % 2]:
            raise ValueError(f"expected roles system first or not at all, then user and assistant "
                             f"in turn; message {first + number + 1} of {len(roles)} is {role!r}")
    if roles[-1:] != ["assistant"]:
        raise ValueError("expected messages of which the last one is of role assistant; "
                         f"found {roles[-8:]}")
    return pairs


def rows_of_columns(columns, name):
    """{"role": [...], "content": [...]} -> [{"role": ..., "content": ...}]."""
    contents = columns.get("content")
    if not isinstance(contents, list) or len(contents) != len(columns["role"]):
        raise ValueError(f"expected as many contents as roles in the columns of field {name!r}")
    return [{"role": role, "content": content}
            for role, content in zip(columns["role"], contents)]
