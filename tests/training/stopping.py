"""Training that is interrupted on the way, as Ctrl-C would do it."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest

from vllm_wsi.training.trainer import ScheduleCallback


@contextmanager
def stopped_at(step: int):
    """Interrupts the training within before the step that follows `step` steps; it is an error if none is."""
    begin = ScheduleCallback.on_step_begin

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with patch.object(ScheduleCallback, "on_step_begin", stop), pytest.raises(KeyboardInterrupt):
        yield
