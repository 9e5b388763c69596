"""Which worked examples (shots) stand before each multiple-choice question, as two tools draw them.

    gauntlet   questions 0 1 2 3 4, two shots, one stream of random numbers:
               0 <- {3, 1}   1 <- {0, 4}   2 <- {2, 3}, which has itself: another for it, {3, 0} ...
    lm_eval    two shots out of a pool (a train split), one stream: 0 <- [b, f]   1 <- [c, a] ...
               MMLU: the first two of the question's subject
"""
import random

from runtime import print0


def gauntlet_shots(questions, shots, seed):
    """For each question its shots, drawn from the questions of the same subject."""
    # indices of the questions of each subject
    by_subject = {}
    for i, question in enumerate(questions):
        by_subject.setdefault(question.subject, []).append(i)
    # each subject draws from itself
    drawn = [None] * len(questions)
    for subject, members in by_subject.items():
        if len(members) <= shots:
            which = f" of {subject}" if subject else ""
            print0(f"note: {len(members)} questions{which} have {len(members) - 1} others "
                   f"as shots, fewer than the {shots} asked for")
        of_members = gauntlet_shot_indices(len(members), shots, seed)
        for i, indices in zip(members, of_members):
            drawn[i] = [questions[members[index]] for index in indices]
    return drawn


def gauntlet_shot_indices(count, shots, seed):
    """For each of `count` questions the indices of its shots, in LLM Foundry's order, which is that
    of a set of ints."""
    rng = random.Random(seed)
    shots = min(count - 1, shots)
    drawn = []
    for index in range(count):
        chosen = set()
        if shots:
            chosen.update(rng.sample(range(count), shots))
        # instead of itself, another one
        if index in chosen:
            chosen.remove(index)
            while len(chosen) < shots:
                other = rng.choice(range(count))
                if other != index:
                    chosen.add(other)
        drawn.append(list(chosen))
    return drawn


def lm_eval_shots_from(pool, questions, shots, spare_shot):
    """For each question its shots out of `pool`, as lm-eval 0.4.2 draws them.

    spare_shot: it draws one more than it uses where a task has no split for shots or tests.
    Raises ValueError for a pool with too few."""
    if not shots:
        return [[] for _ in questions]
    # one stream of draws through all questions
    asked = shots + spare_shot
    if asked > len(pool):
        raise ValueError(f"lm_eval_shots={shots}: lm_eval_shot_data holds {len(pool)} items, "
                         f"expected {asked}")
    rng = random.Random(1234)
    return [rng.sample(pool, asked)[:shots] for _ in questions]


def lm_eval_shots_of_subject(pool, questions, shots):
    """For each question the first of its subject in `pool`; ValueError where they are too few."""
    by_subject = {}
    for shot in pool:
        by_subject.setdefault(shot.subject, []).append(shot)
    drawn = []
    for question in questions:
        found = by_subject.get(question.subject, [])
        if len(found) < shots:
            raise ValueError(f"lm_eval_shots={shots}: lm_eval_shot_data holds {len(found)} of "
                             f"{question.subject}")
        drawn.append(found[:shots])
    return drawn
