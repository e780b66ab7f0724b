from fastpeft.tui.screens.base import RunsKeys
class RunScreen(RunsKeys):
    def __init__(self, name): super().__init__(); self._n=name
    def target(self): return self._n
