"""The `dnl` command: the paper's depth sweep (train), its report, the convergence studies (converge), and info."""
