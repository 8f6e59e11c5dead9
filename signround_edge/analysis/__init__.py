"""`analyze`: what tuning did to the roundings of a run, as the figures 2 to 4 of arXiv 2309.05516 show it."""
