"""What a training run is, whatever it trains; `npg.vision` and `agents` say what is in theirs."""
