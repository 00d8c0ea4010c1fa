"""Tools around the book: costs, memory, figures, pages, the gate, the faster training path."""
