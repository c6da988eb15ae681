"""The general executors: any module and any loss, by autograd."""
