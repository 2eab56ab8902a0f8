"""Reading ahead: the pages of coming tensors are on their way from the disk while others are merged."""

import threading

from freemerge.plan import Plan, TensorTask

READ_AHEAD = 512 << 20  # bytes of input asked for before they are needed


class ReadAhead(threading.Thread):
    """Asks for the inputs of coming tasks, READ_AHEAD bytes in front of the workers."""

    def __init__(self, plan: Plan, tasks: list[TensorTask]):
        super().__init__(daemon=True)
        self._plan, self._tasks = plan, tasks
        self._reached = 0
        self._starts = {}
        self._change = threading.Condition()
        self._stopped = False

    def run(self) -> None:
        asked = 0
        for task in self._tasks:
            with self._change:
                self._starts[task.name] = asked
                while not self._stopped and asked - self._reached > READ_AHEAD:
                    self._change.wait()
                if self._stopped:
                    return
            asked += self._ask(task)

    def _ask(self, task: TensorTask) -> int:
        for checkpoint, name in self._plan.inputs(task):
            checkpoint.prefetch(name)
        return self._plan.bytes_read(task)

    def reached(self, task: TensorTask) -> None:
        with self._change:
            self._reached = max(self._reached, self._starts.get(task.name, 0))
            self._change.notify_all()

    def stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
