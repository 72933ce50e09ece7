"""One file per foreign contract; none is imported unless asked for."""
