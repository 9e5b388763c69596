r"""How a multiple-choice question becomes sequences of ids, one a choice, as two tools write it.

    gauntlet   [BOS shots] [\nquestion: ... He] [ is ripping tiles.]     three texts, encoded apart
    lm_eval    [shots question: ... He] [ is ripping tiles.]            one text, cut in two

    -> (ids, how many of them, at the end, are the choice's: these are scored)

lm-eval cuts behind as many ids as the context has alone. Where a token reaches over this border,
the choice loses it, and a choice may have nothing left: lm-eval 0.4.2 ends with an AssertionError
then, here that item is refused.
"""


def gauntlet_sequences(question, shots, delimiter, tok, bos, max_len):
    """[(ids, how many at their end are scored)] of the choices, and how many were cut on the left;
    or ([], None) where a choice has no token to score.

    Raises ValueError for a choice longer than max_len."""
    worked = [delimiter.join(shot.pairs[shot.gold]) for shot in shots]
    preamble = "\n".join(worked)
    front = tok.encode(preamble)
    if bos:
        front = [tok.bos_id] + front

    # a vocabulary of words that begin with their blank wants one before a choice
    spaced = len(tok.encode(" a")) == 1
    sequences = []
    for context, choice in question.pairs:
        # the context, tokenized apart from the shots
        if len(question.contexts) == 1:
            text = (context + delimiter).rstrip()
        elif shots:
            text = context + delimiter.rstrip()
        else:
            text = context
        if preamble:
            text = "\n" + text
        # the choice, tokenized apart from its context
        if spaced and not choice.startswith(" "):
            choice = " " + choice
        scored = tok.encode(choice)
        sequences.append((front + tok.encode(text) + scored, len(scored)))
    return cut_sequences(sequences, max_len)


def lm_eval_sequences(question, shots, delimiter, tok, bos, max_len):
    """As gauntlet_sequences, for lm-eval's prompts; its limit is on what goes in, and the last id
    does not."""
    between = delimiter[:-1]  # lm-eval itself puts the blank before a choice
    front = ""
    if question.subject:
        # one line end: of the two in its task file, lm-eval 0.4.2 loses one to jinja
        subject = question.subject.replace("_", " ")
        front = f"The following are multiple choice questions (with answers) about {subject}.\n"
    for shot in shots:
        context, choice = shot.pairs[shot.gold]
        front += f"{context}{between} {choice}\n\n"
    sequences = []
    for context, choice in question.pairs:
        # both as one text, cut where the context alone would end; a token that reaches over this
        # border belongs to neither: what goes in is the context's own ids
        text = front + context + between
        ids = tok.encode(text.rstrip())
        scored = tok.encode(f"{text} {choice}")[len(ids):]
        if bos:
            ids = [tok.bos_id] + ids
        sequences.append((ids + scored, len(scored)))
    return cut_sequences(sequences, max_len + 1)


def cut_sequences(sequences, most):
    """The sequences with at most `most` ids each, their ends, and how many were longer."""
    # lm-eval ends its run with an AssertionError here
    if min(scored for _, scored in sequences) == 0:
        return [], None
    longest = max(scored for _, scored in sequences)
    if longest >= most:
        raise ValueError(f"max_seq_len: a choice of {longest} tokens leaves no room for a question")
    longer = sum(len(ids) > most for ids, _ in sequences)
    return [(ids[-most:], scored) for ids, scored in sequences], longer
