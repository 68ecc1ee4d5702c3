"""Whether the answers of all runs are those of one process."""

from __future__ import annotations

from collections.abc import Sequence

from bench.chain import alone, checkouts

from shoal.engine.model_directory import Model


class Audit:
    """The answers of many runs, kept to be compared in the end: one process answers each prompt once, as far
    as the longest answer."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._found: dict[int, list[tuple[str, Sequence[Sequence[int]]]]] = {}

    def add(self, run: str, prompt: int, answers: Sequence[Sequence[int]]) -> None:
        """Notes the answers of the streams of a run, to prompts of this length. In a run that goes on with
        answers of another one, these are the first part of its own."""
        self._found.setdefault(prompt, []).append((run, answers))

    def problems(self) -> list[str]:
        """A sentence for each stream of a run whose answer is another one."""
        wrong = []
        for prompt, runs in self._found.items():
            most = max(len(own) for _, answers in runs for own in answers)
            streams = max(len(answers) for _, answers in runs)
            job = {"prompt": prompt, "tokens": most, "batches": [streams]}
            right = alone(checkouts(None)[0], self._model, "decode", **job)["runs"][0]["tokens"]
            for run, answers in runs:
                for i, (own, known) in enumerate(zip(answers, right, strict=False)):
                    if list(own) != known[: len(own)]:
                        at = next(n for n, (a, b) in enumerate(zip(own, known, strict=False)) if a != b)
                        wrong.append(f"{run}: stream {i} is not what one process answers from token {at} on")
        return wrong
