"""``python -m hf_sp``, the same as ``hf-sp``."""

from hf_sp.commands.main import main

if __name__ == "__main__":
    main()
