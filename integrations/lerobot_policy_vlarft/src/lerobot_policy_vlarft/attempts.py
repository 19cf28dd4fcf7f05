"""Episodes of a LeRobot data set that a policy should not imitate. Needs no lerobot."""

from pathlib import Path

from vlarft.data.lerobot_meta import read_entries, read_info

LISTED = 500  # numbers of episodes in a warning, at most


def attempts_text(root: Path) -> str | None:
    """Return a warning of failed, noisy and policies' episodes, with those to choose instead; None: there are none.

    Which episodes lerobot-train chose is not known to a policy.

    Raises:
        FileNotFoundError: a file below meta/ is missing.
        ValueError: one is not as `read_info` and `read_entries` expect it.
    """
    entries, _ = read_entries(root, read_info(root), [])
    good = [str(e.index) for e in entries if e.success and e.kind == "expert"]
    if len(good) == len(entries):
        return None
    listed = ",".join(good[:LISTED]) + f",... ({len(good)} in all)" * (len(good) > LISTED)
    return (
        f"{root}: {len(entries) - len(good)} of {len(entries)} episodes are failed, noisy or played by a policy; "
        "lerobot-train imitates every episode it is given: "
        + (f"choose the others, --dataset.episodes='[{listed}]'" if good else "give it successful demonstrations")
    )
