"""``hem-ext`` with a checkpoint after every epoch, however short: run as a script, also by torchrun."""

from hem_ext.command import main
from hem_ext.harness import training

if __name__ in ("__main__", "__mp_main__"):  # the second in processes that run cells side by side
    training._Checkpoints.pause = 0

if __name__ == "__main__":
    main()
