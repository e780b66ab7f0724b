from fastpeft.tui.screens.base import RunsKeys
class CompareScreen(RunsKeys):
    def __init__(self, names): super().__init__()
