"""What people look at: pages of experiments and studies, their figures, and the statistics behind them."""
