"""
Texts printed while they are made: one as it comes, several in columns, line by line.

    Once upon a time,  | Once there was a     a line is printed when no column can change it any
    there was a little | big dog. It liked    more, so that it can go into a file or a pipe as well

A piece is some text, possibly empty; an answer is an iterator of pieces.
"""
GAP = " | "  # between columns


def column_width(room, count):
    """The width of each of `count` columns in `room` characters; ValueError below 10."""
    width = (room - len(GAP) * (count - 1)) // count
    if width < 10:
        raise ValueError(f"{room} columns of the terminal are too few for {count} models; "
                         "COLUMNS=200 in front of the command gives more")
    return width


def print_alone(pieces):
    """Print an answer as it comes; returns ([its text], how many pieces it came in)."""
    parts = []
    for piece in pieces:
        print(piece, end="", flush=True)
        parts.append(piece)
    print()
    return ["".join(parts)], len(parts)


def print_side_by_side(answers, width):
    """Print answers in columns, a line once no column can change it; returns (texts, pieces)."""
    texts = [""] * len(answers)
    running = list(range(len(answers)))
    count = 0
    printed = 0
    while running:
        # a piece of each, in turn
        for i in list(running):
            piece = next(answers[i], None)
            if piece is None:
                running.remove(i)
                continue
            texts[i] += piece
            count += 1
        # the last line of a text that still grows may change
        columns = [lines_of(text, width) for text in texts]
        settled = max(map(len, columns))
        if running:
            settled = min(len(columns[i]) - 1 for i in running)
        for row in range(printed, settled):
            print_row([lines[row] if row < len(lines) else "" for lines in columns], width)
        printed = max(printed, settled)
    return texts, count


def print_row(cells, width):
    padded = [cell.ljust(width) for cell in cells]
    print(GAP.join(padded).rstrip(), flush=True)


def lines_of(text, width):
    """The lines of a text in a column; more text changes none but the last."""
    lines = []
    for rest in text.expandtabs(4).split("\n"):
        while len(rest) > width:
            # at the last blank that fits, else inside a word
            cut = rest.rfind(" ", 1, width + 1)
            if cut < 0:
                cut = width
            lines.append(rest[:cut])
            rest = rest[cut:].removeprefix(" ")
        lines.append(rest)
    return lines
