"""``python -m shoal.cli``, for where there is no ``shoal`` on the path."""

from shoal.cli import main

if __name__ == "__main__":
    main()
