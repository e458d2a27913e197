"""Two workers and a coordinator, each in a network namespace of its own, with a slow and a fast cable between them: the ways are measured,
the better one is taken, its time is predicted, and when it is unplugged the other one is taken. Wants root; says so and passes without."""

import shutil
import sys
import time
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import models
from harness.cluster import Processes
from harness.report import Report
from namespaces import Network, NotPermitted

# Bits per second.
CABLES = {"slow": 50e6, "fast": 1e9}
HTTP = "127.0.0.1:8080"
MODEL = "very-wide"
TOKEN_BYTES = 4 * models.CONFIGS[MODEL][0]["hidden_size"]
# As many as the engines read in one part: 4 MiB.
PROMPT_TOKENS = 64
WITHIN = 0.25
# Other programs on this machine do not come between.
UNDISTURBED = ["chrt", "--fifo", "10"] if shutil.which("chrt") else []


class Cluster(Processes):
    def __init__(self, net: Network):
        super().__init__()
        self.net = net
        join = f"{net.address('c', 'slow')}:7070"
        self.start("coordinator", "coordinator", "--model", str(models.path(MODEL)), "--cluster", "net", "--min-workers", "2",
                   "--strategy", "pipeline", "--http", HTTP, "--listen", join, prefix=[*net.inside("c"), *UNDISTURBED])
        for name in ("a", "b"):
            self.start(name, "worker", "--cluster", "net", "--name", name, "--join", join, prefix=[*net.inside(name), *UNDISTURBED])

    def status(self) -> dict:
        return requests.get(f"http://{HTTP}/v1/cluster", timeout=5).json()

    def until(self, what: str, is_so, seconds: float = 60) -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            try:
                status = self.status()
                if is_so(status):
                    return status
            except requests.ConnectionError:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"{what}: not within {seconds} s\n{self.logs()}")

    def post(self, prompt_tokens: int, max_tokens: int) -> requests.Response:
        body = {"prompt": [7 * i % 250 for i in range(prompt_tokens)], "max_tokens": max_tokens, "ignore_eos": True}
        return requests.post(f"http://{HTTP}/v1/completions", json=body, timeout=120)

    def ask(self, prompt_tokens: int, max_tokens: int) -> None:
        answer = self.post(prompt_tokens, max_tokens)
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code} {answer.text[:300]}\n{self.logs()}")

    def answers(self) -> bool:
        return self.post(4, 4).status_code == 200


def is_ready(status: dict) -> bool:
    return status["instance"]["state"] == "ready"


def chosen(status: dict) -> dict[tuple[str, str], dict]:
    return {(link["from"], link["to"]): link for link in status["links"] if link["chosen"]}


def every_way_is_measured(net: Network, status: dict) -> str | None:
    seen = sorted((link["from"], link["to"], link["address"]) for link in status["links"])
    wanted = sorted((a, b, net.address(b, cable)) for a, b in (("a", "b"), ("b", "a")) for cable in CABLES)
    if seen != wanted:
        return f"{seen}, not {wanted}"
    wrong = []
    for link in status["links"]:
        print(f"  {link['from']} -> {link['to']} {link['address']} {link['interface']} ({link['medium']}): "
              f"{link['round_trip_seconds'] * 1e3:.3f} ms, {link['bytes_per_second'] * 8 / 1e6:.0f} Mbit/s")
        cable = next(name for name in CABLES if net.address(link["to"], name) == link["address"])
        # Without a quiet machine, programs are slower than the fast cable.
        ratio, least = link["bytes_per_second"] * 8 / CABLES[cable], 0.8 if cable == "slow" else 0.25
        if (link["interface"], link["medium"]) != (cable, "ethernet") or not least < ratio < 1.1:
            wrong.append(f"{link['from']} -> {link['to']} over the {cable} cable")
    return ", ".join(wrong) or None


def takes(net: Network, status: dict, cable: str) -> str | None:
    wrong = [link for link in chosen(status).values() if link["address"] != net.address(link["to"], cable)]
    return f"another way is taken: {wrong}" if wrong or len(chosen(status)) != 2 else None


def carries(net: Network, cluster: Cluster, cable: str) -> str | None:
    """A prompt's activations really pass over this cable."""
    def sent(name: str) -> int:
        return sum(net.sent_bytes(machine, name) for machine in ("a", "b"))

    other = next(name for name in CABLES if name != cable)
    before = {name: sent(name) for name in CABLES}
    cluster.ask(PROMPT_TOKENS, 1)
    taken, spared = sent(cable) - before[cable], sent(other) - before[other]
    print(f"  {taken / 1e6:.2f} MB over the {cable} cable, {spared / 1e6:.2f} MB over the {other} one")
    return None if taken > TOKEN_BYTES * PROMPT_TOKENS > 10 * spared else "the activations took another way"


def the_plan_knows(net: Network, status: dict) -> str | None:
    """The plan was made with the faster cable in mind, and says how long a hop takes at decode."""
    hops = [way for way in status["plan"]["prediction"]["ways"] if way["kind"] == "hop"]
    addresses = {way["address"] for way in hops}
    if addresses != {net.address("a", "fast"), net.address("b", "fast")}:
        return f"planned over {addresses}"
    predicted, measured = sum(way["seconds"] for way in hops) / len(hops), status["load"]["hop_ns"] / 1e9
    error = predicted / measured - 1
    print(f"  decode hop: the plan says {predicted * 1e3:.3f} ms, measured {measured * 1e3:.3f} ms ({error:+.0%})")
    return f"{error:+.0%}" if abs(error) > WITHIN else None


def hops_are_predicted(cluster: Cluster, names: list[str]) -> str | None:
    """Those of `names`. A message that passes in less time than it takes to wake four threads says more about the machine than about the cable."""
    for _ in range(5):
        cluster.ask(PROMPT_TOKENS, 16)
    status = cluster.status()
    load, ways = status["load"], chosen(status)
    # There and back: a step goes from the lead to the last stage, its result from there to the lead.
    lead, last = (stage["ranks"][0]["worker"] for stage in status["plan"]["stages"])

    def seconds(way: dict, size: int) -> float:
        return way["round_trip_seconds"] / 2 + size / way["bytes_per_second"]

    cases = {"prompt": (seconds(ways[lead, last], load["prompt_hop_bytes"]), load["prompt_hop_ns"] / 1e9, load["prompt_hop_bytes"]),
             "decode": ((seconds(ways[lead, last], TOKEN_BYTES) + seconds(ways[last, lead], 50)) / 2, load["hop_ns"] / 1e9, TOKEN_BYTES)}
    wrong = []
    for name, (predicted, measured, size) in cases.items():
        error = predicted / measured - 1
        print(f"  {name} hop of {size} bytes: predicted {predicted * 1e3:.3f} ms, measured {measured * 1e3:.3f} ms ({error:+.0%})")
        wrong += [f"{name} {error:+.0%}"] if name in names and abs(error) > WITHIN else []
    return ", ".join(wrong) or None


def run(report: Report, net: Network) -> None:
    net.enter("c")
    with Cluster(net) as cluster:
        status = cluster.until("a model that answers", is_ready)
        report.check("every way is measured", every_way_is_measured, net, status)
        report.check("the faster cable is taken", takes, net, status, "fast")
        report.check("and carries the activations", carries, net, cluster, "fast")
        report.check("hops are predicted", hops_are_predicted, cluster, ["prompt"])
        report.check("the plan took the faster cable and knew its time", the_plan_knows, net, cluster.status())
        for machine in ("a", "b"):
            net.set_cable(machine, "fast", "down")
        status = cluster.until("ways without the fast cable", lambda status: len(status["links"]) == 2)
        cluster.until("an answer without the fast cable", lambda status: is_ready(status) and cluster.answers())
        report.check("unplugged, the slower one is taken", takes, net, status, "slow")
        report.check("and carries the activations", carries, net, cluster, "slow")
        report.check("hops are predicted", hops_are_predicted, cluster, ["prompt", "decode"])


def main() -> None:
    report = Report()
    try:
        with Network(["c", "a", "b"], {name: f"{rate / 1e6:.0f}mbit" for name, rate in CABLES.items()}) as net:
            run(report, net)
    except NotPermitted as error:
        print(f"skipped, because this needs root and network namespaces: {error}")
        return
    report.close()


if __name__ == "__main__":
    main()
