"""How the committed token file was made: 4,096 bytes of the language reference as numbers. Run once; the file is the fixture."""

from pathlib import Path

import numpy as np


def main() -> None:
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in ("assert", "with", "lambda"))[:4096].encode()
    np.save(Path(__file__).parent / "tokens.npy", np.frombuffer(text, dtype=np.uint8).astype(np.uint16))


if __name__ == "__main__":
    main()
