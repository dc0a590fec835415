"""References and the objects behind them: who owns one, who borrows it, how it is shared, how a lost one is found."""
