"""The CPU: exact routes through a contraction, which differ in speed alone, and the passes around them."""
