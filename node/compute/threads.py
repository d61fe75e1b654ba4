"""How many threads a decoding step should use: learned from how long steps take, again and again.

The threads of one matrix product wait for the slowest. When another process takes a core away, the
others wait for it at every product: on two cores, one busy neighbour makes two threads several times
slower than one. The right number therefore depends on who else computes now.

That somebody does shows in one step: threads that have a core each use all the time there is (measured: .96
to 1.0 of it, at 1 to 256 rows), beside one busy neighbour on two cores they get 0.57 to 0.75. So fewer
threads are tried at once when time is missing, and hardly ever when it is not. Whether a neighbour has gone
shows only in trying more, which is done less and less often while it is in vain.

(Making waiting threads sleep instead of spin helps beside a neighbour, but costs two threads on idle cores
nearly half their speed: measured 33 ms a step spinning, 60 ms sleeping, 45 ms with one thread.)
"""

from __future__ import annotations

__all__ = ["ThreadChoice"]

_TRIAL_STEPS = 4  # about 0.2 s of decoding for a small model: long enough to out-vote one interruption
_CALM_STEPS_MIN = 4  # after a change: the next one may follow
# Undisturbed, another number is tried all the same: cores may be unequal, or share what is slow. Not in the
# first seconds, which are the only ones of a short answer.
_CALM_STEPS_FIRST = 64
_CALM_STEPS_MAX = 1024  # a needless trial every 1024 steps costs 4 slower ones: under 1 %
_HOPELESS = 2.0  # one step this much slower than what we have ends a trial: it may have cost a second
_CROWDED = 0.85  # of the time of all threads: less means that somebody else has a core
_SLOWER = 1.5  # a window this much slower than the best one seen is reason to try at once


class ThreadChoice:
    """Tells the number of threads before each step and hears the step's time after it.

    Between trials it runs on the best number known. A trial runs the next candidate for a few steps and
    keeps it if its fastest step was faster. Trials that change nothing double the time to the next one.
    """

    def __init__(self, threads_max: int) -> None:
        candidates = [threads_max]
        while candidates[-1] > 1:
            candidates.append(candidates[-1] // 2)
        self._candidates = tuple(candidates)
        self._at = 0
        self._tried = 0
        self._trying: int | None = None
        self._window: list[float] = []
        self._current_s = float("inf")
        self._best_s = float("inf")
        self._calm_steps = _CALM_STEPS_FIRST
        self._crowded_steps = 1
        """After so many steps since the last trial, missing time is reason for another one."""
        self._since_trial = 1

    @property
    def threads(self) -> int:
        return self._candidates[self._at if self._trying is None else self._trying]

    def saw(self, step_s: float, cpu_share: float = 1.0) -> None:
        """What the last step took.

        Args:
            step_s: Seconds for an amount of work that is the same at every call.
            cpu_share: Processor time this process used, over what its threads could have used.
        """
        if len(self._candidates) == 1:
            return
        is_crowded = cpu_share < _CROWDED and self._at + 1 < len(self._candidates)
        if self._trying is None and is_crowded and self._since_trial >= self._crowded_steps:
            self._crowded_steps = min(2 * self._crowded_steps, _CALM_STEPS_MAX)
            self._window.clear()
            self._current_s = step_s
            self._trying = self._tried = self._at + 1
            return
        if self._trying is not None and step_s > _HOPELESS * self._current_s:
            self._window.clear()
            self._judge(step_s)
            return
        self._window.append(step_s)
        self._since_trial += 1
        if len(self._window) < _TRIAL_STEPS:
            return
        # The median step: a single interruption says nothing about the number of threads.
        typical_s = sorted(self._window)[_TRIAL_STEPS // 2]
        self._window.clear()
        if self._trying is not None:
            self._judge(typical_s)
        else:
            self._current_s = typical_s
            self._best_s = min(self._best_s, typical_s)
            slowed = typical_s > _SLOWER * self._best_s and self._since_trial >= _CALM_STEPS_MIN
            if slowed or self._since_trial >= self._calm_steps:
                self._trying = self._next_candidate()
        assert len(self._window) < _TRIAL_STEPS

    def _next_candidate(self) -> int:
        self._tried = (self._tried + 1) % len(self._candidates)
        if self._tried == self._at:
            self._tried = (self._tried + 1) % len(self._candidates)
        return self._tried

    def _judge(self, typical_s: float) -> None:
        assert self._trying is not None
        if typical_s < self._current_s:
            self._at = self._trying
            self._current_s = self._best_s = typical_s
            self._calm_steps, self._crowded_steps = _CALM_STEPS_MIN, 1
        else:
            self._best_s = self._current_s
            self._calm_steps = min(2 * self._calm_steps, _CALM_STEPS_MAX)
        self._trying = None
        self._since_trial = 0
