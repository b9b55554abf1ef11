"""A migration in words: where its VM runs, how far it came, how it ended."""

from sealane.cli import format as words
from sealane.host.models import Migration, NotSent, Problem

ENDED = frozenset({"completed", "aborted"})

STAGES = {
    "queued": "queue",
    "preparing": "prepare",
    "copying": "copy",
    "switching-over": "switch",
    "handing-over": "hand-over",
    "postcopy": "postcopy",
    "postcopy-paused": "paused",
}


def where(migration: Migration) -> str:
    """Where the VM runs, as the host that is asked knows it; where QEMU itself does not answer, nobody can say that it runs."""
    vm, peer = migration.vm, migration.peer
    code = None if migration.problem is None else migration.problem.code
    if (migration.role, migration.runs_at, code) == ("source", "source", "vm.unreachable"):
        return f"{vm} does not answer here"
    if (migration.role, migration.runs_at, code) == ("source", "source", "vm.not-running"):
        return f"{vm} was not touched"
    if migration.runs_at == "nowhere":
        return f"{vm} runs nowhere"
    if migration.role == "source":
        return {
            "source": f"{vm} still runs here",
            "destination": f"{vm} runs on {peer}",
            "in-doubt": f"{vm} is paused here and may run on {peer}",
        }[migration.runs_at]
    return {
        "source": f"{vm} still runs on {peer}",
        "destination": f"{vm} runs here",
        "in-doubt": f"{vm} may run here or on {peer}",
    }[migration.runs_at]


def warning(migration: Migration) -> str:
    """What the protection leaves readable, loudly; nothing where it is all sealed."""
    return "" if migration.readable == "nothing" else f"! {migration.protection} is weak; {migration.readable}"


def copied(migration: Migration) -> int | None:
    """How much of the copy is done, in per cent; None before the first byte."""
    progress = migration.progress
    if progress.bytes_transferred == 0 and progress.bytes_wire == 0:
        return None
    total = progress.bytes_total + progress.disk_bytes_total
    return words.percent(total - progress.bytes_remaining - progress.disk_bytes_remaining, total)


def headline(migration: Migration) -> str:
    """The first line of how a migration that did not succeed ended."""
    if migration.state == "in-doubt" or migration.runs_at == "in-doubt":
        return f"in doubt: {where(migration)}"
    if migration.state == "postcopy-paused":
        return f"postcopy was cut; {where(migration)}, and stands still where it lacks a page"
    done = copied(migration)
    cancelled = migration.problem is not None and migration.problem.code == "migration.cancelled"
    verb = "cancelled" if cancelled else "aborted"
    if done is None and not migration.progress.bytes_wire:
        how = "cancelled before anything moved" if cancelled else "refused before anything moved"
    elif done is None:
        how = verb
    else:
        how = f"{verb} at {done} %"
    return f"{how}; {where(migration)}"


def outcome(migration: Migration) -> str:
    """One cell of a table: how it goes or why it ended."""
    if migration.state == "completed" and migration.runs_at == "nowhere" and migration.problem is not None:
        return reason(migration.problem)
    if migration.state == "completed":
        result = migration.result
        if result is None:
            return "completed"
        down = "" if result.downtime_ms is None else f", {words.duration(result.downtime_ms / 1000)} down"
        return f"completed in {words.duration(result.total_ms / 1000)}{down}"
    if migration.problem is not None:
        return reason(migration.problem)
    done = copied(migration)
    share = "" if done is None or migration.state != "copying" else f" {done} %"
    if migration.queue is not None:
        share = f", {migration.queue.place} of {migration.queue.waiting}"
    return f"{migration.state}{share}"


def reason(problem: Problem) -> str:
    """What went wrong, and its code."""
    return f"{problem.detail} ({problem.code})"


def progress_figures(migration: Migration) -> dict[str, str]:
    """The copy's figures, those that are known: share, bytes, rate, iteration, dirty rate, what is left."""
    progress = migration.progress
    done = copied(migration)
    sent = progress.bytes_wire or progress.bytes_transferred
    copied_bytes = max(0, progress.bytes_total - progress.bytes_remaining)
    rate, dirty, left = progress.rate_bytes_per_s, progress.dirty_rate_bytes_per_s, progress.eta_s
    total = words.memory_bytes(progress.bytes_total)
    figures = {
        "share": None if done is None else f"{done} %",
        "copied": f"{words.memory_bytes(copied_bytes)} of {total}" if progress.bytes_total else None,
        "disks": f"{words.memory_bytes(progress.disk_bytes_total - progress.disk_bytes_remaining)} of "
        f"{words.memory_bytes(progress.disk_bytes_total)} of disks"
        if progress.disk_bytes_total
        else None,
        "sent": f"{words.network_bytes(sent)} sent" if sent else None,
        "rate": None if rate is None else words.rate(rate),
        "limit": f"of {words.rate(progress.rate_limit_bytes_per_s)}" if progress.rate_limit_bytes_per_s else None,
        "iteration": f"iteration {progress.iteration}" if progress.iteration else None,
        "dirty": None if dirty is None else f"dirty {words.rate(dirty)}",
        "requests": None if progress.postcopy_requests is None else f"{progress.postcopy_requests} pages asked for",
        "throttle": f"guest slowed by {progress.throttle_percent} %" if progress.throttle_percent else None,
        "left": "no end in sight"
        if progress.converges is False
        else None
        if left is None
        else f"{words.duration(left)} left",
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def progress_parts(migration: Migration) -> list[str]:
    """The figures of `progress_figures`, in their order."""
    return list(progress_figures(migration).values())


def channel_parts(migration: Migration) -> list[str]:
    """What protects the lanes, as far as it is known."""
    parts = [part for part in (migration.tls_version, migration.kex_group, migration.cipher) if part]
    if migration.multifd_channels:
        parts.append(f"{migration.multifd_channels} multifd channels")
    return parts


def trust_parts(migration: Migration) -> list[str]:
    """How far the other host is trusted, and what that rests on, as far as it is known."""
    trust = migration.peer_trust
    if trust is None:
        return []
    parts = [f"level {trust.level}", trust.root]
    if trust.production_level < trust.level:
        parts.append(f"level {trust.production_level} without test roots")
    if trust.evidence and trust.seen_at is not None:
        parts.append(f"evidence of {words.ago(trust.seen_at)}")
    return parts


def success_parts(migration: Migration) -> list[str]:
    """The figures of a completed migration."""
    parts: list[str] = []
    result = migration.result
    if result is not None:
        parts.append(f"total {words.duration(result.total_ms / 1000)}")
        if result.downtime_ms is not None:
            parts.append(f"{words.duration(result.downtime_ms / 1000)} down")
        parts.append(f"{words.network_bytes(result.bytes_wire)} on the wire")
    parts += [part for part in (migration.kex_group, migration.cipher) if part]
    if result is not None:
        parts += not_sent_parts(result.not_sent)
    return parts


def not_sent_parts(not_sent: NotSent) -> list[str]:
    """What did not cross the wire and why; nothing where everything did."""
    by_reason = {"zero": not_sent.zero_bytes, "same": not_sent.same_bytes, "zstd": not_sent.zstd_bytes}
    reasons = ", ".join(f"{name} {words.network_bytes(count)}" for name, count in by_reason.items() if count > 0)
    return [f"{words.network_bytes(sum(by_reason.values()))} not sent ({reasons})"] if reasons else []
