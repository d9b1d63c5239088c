"""`python -m deepfusion.cli` is the command `deepfusion`."""

from deepfusion.cli import main

if __name__ == "__main__":
    main()
