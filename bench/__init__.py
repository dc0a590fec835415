"""The same small programs on Shoal, on Ray and on Dask, in turn, in one run: ``make bench``."""
