"""What a person sees while stages run: one stable line per step, a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO

PLAIN_EVERY_S = 10.0  # piped output: at most one progress line per this many seconds, besides the first and the last


class Progress:
    """Listens to events. `quiet` keeps only stage ends and notes."""

    def __init__(self, quiet: bool = False, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self.live = self.out.isatty()
        self.quiet = quiet
        self._last = 0.0
        self._open = False
        self._valid = ""
        self._began = time.perf_counter()

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "step":
            self._step(event)
        elif kind == "progress":
            self._progress(event)
        elif kind == "valid":
            shown = {name: value for name, value in event["metrics"].items() if not name.startswith("held_out/")}
            self._valid = "  " + "  ".join(f"{name} {_number(value)}" for name, value in shown.items())
        elif kind == "note":
            self._line(f"  {event['stage']}: {event['text']}")
        elif kind == "stage_start":
            self._began, self._valid, self._last = time.perf_counter(), "", 0.0
        elif kind == "stage_end":
            self._line(f"  {event['stage']}: done in {clock(event['seconds'])}, peak {event['peak_rss_mb']:,.0f} MB")

    def _step(self, event: dict[str, Any]) -> None:
        step, total = event["step"], event["total"]
        loss = "  ".join(f"{name} {value:.4f}" for name, value in event["losses"].items())
        logits = event.get("max_logits")
        parts = [
            f"  {event['stage']} {step:>{len(str(total))}}/{total}",
            f"{loss}",
            f"norm {event['grad_norm']:.3f}",
            f"lr {event['lr']:.2e}",
            f"{event['tokens_per_s']:,.0f} tok/s",
        ]
        if "mfu" in event:
            parts.append(f"MFU {event['mfu']:.1%}")
        elif "tflops" in event:
            parts.append(f"{event['tflops']:.3f} TFLOP/s")
        if "rollout" in event:
            told = event["rollout"]
            parts.insert(1, f"reward {told['reward']:.3f}  {told['length']:.1f} tokens")
            parts.append(f"lag {told['lag']:.0f}")
        if "mismatch_max" in event.get("metrics", {}):
            parts.append(f"mismatch {_short(event['metrics']['mismatch_max'])}")
        if logits:
            parts.append(f"maxlogit {max(max(values) for values in logits.values()):.1f}")
        parts += [f"{event['rss_mb']:,.0f} MB", f"ETA {clock(event['eta_s'])}"]
        self._show("  ".join(parts) + self._valid, step / max(1, total), last=step == total)

    def _progress(self, event: dict[str, Any]) -> None:
        done, total = event["done"], event.get("total")
        share = done / total if total else 0.0
        amount = f"{done:,}/{total:,}" if total else f"{done:,}"
        eta = event.get("eta_s")
        if eta is None and total and done:
            eta = (time.perf_counter() - self._began) / done * (total - done)
        text = f"  {event['stage']} {amount} {event.get('unit', '')}" + (f"  ETA {clock(eta)}" if eta is not None else "")
        self._show(text, share, last=bool(total) and done >= total)

    def _show(self, text: str, share: float, last: bool) -> None:
        if self.quiet:
            return
        now = time.perf_counter()
        if self.live:
            width = shutil.get_terminal_size((120, 20)).columns
            bar = "█" * round(share * 12) + "·" * (12 - round(share * 12))
            line = f"{bar}{text}"[: width - 1]
            self.out.write(f"\r{line:<{width - 1}}" + ("\n" if last else ""))
            self._open = not last
            self.out.flush()
        elif last or self._last == 0.0 or now - self._last >= PLAIN_EVERY_S:
            self.out.write(text + "\n")
            self.out.flush()
            self._last = now

    def _line(self, text: str) -> None:
        if self._open:
            self.out.write("\n")
            self._open = False
        self.out.write(text + "\n")
        self.out.flush()


def _number(value: float | str) -> str:
    """A number with four decimals; one that is not finite comes as a text already."""
    return value if isinstance(value, str) else f"{value:.4f}"


def _short(value: float | str) -> str:
    """A small number with two digits; one that is not finite comes as a text already."""
    return value if isinstance(value, str) else f"{value:.1e}"


def clock(seconds: float) -> str:
    """Seconds as a person says them: 8.2 s, 3:05, 2:14:09."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
