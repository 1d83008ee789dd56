"""Pairwise covers: few cases of many factors, such that every two values of any two factors meet in one."""

from __future__ import annotations

import itertools
import random


def cover(factors: dict[str, list], seed: int = 0) -> list[dict]:
    """Cases such that every pair of values meets, few of them: each takes what most open pairs ask for."""
    draw = random.Random(seed)
    names = list(factors)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(factors[names[a]]))
        for j in range(len(factors[names[b]]))
    }
    cases = []
    while open_pairs:
        best: tuple[int, list[int]] = (-1, [])
        for _ in range(30):
            (a, i), (b, j) = draw.choice(sorted(open_pairs))
            chosen = {a: i, b: j}
            for c in draw.sample(range(len(names)), len(names)):
                if c not in chosen:
                    gains = [
                        sum(tuple(sorted(((c, k), other))) in open_pairs for other in chosen.items())
                        for k in range(len(factors[names[c]]))
                    ]
                    chosen[c] = draw.choice([k for k, gain in enumerate(gains) if gain == max(gains)])
            row = [chosen[c] for c in range(len(names))]
            covered = sum(
                tuple(((a, row[a]), (b, row[b]))) in open_pairs for a, b in itertools.combinations(range(len(names)), 2)
            )
            best = max(best, (covered, row))
        row = best[1]
        open_pairs -= {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(range(len(names)), 2)}
        cases.append({name: factors[name][row[c]] for c, name in enumerate(names)})
    return cases


def case_name(case: dict) -> str:
    return " ".join(str(v).removeprefix("torch.") for v in case.values())
