"""The ledger charges before anything is spent, never less than was spent, and never more than the budget."""

import json
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from e5core.synth.ledger import TRILLION, BudgetSpent, Charge, Ledger, Spent, price
from e5core.synth.settings import BudgetConfig, ModelConfig

MOST = Charge(100, 50, 7 * TRILLION)
ROOT = Path(__file__).resolve().parent.parent
RESERVE_FOR_EVER = """
import sys
from pathlib import Path
from e5core.synth.ledger import Charge, Ledger
from e5core.synth.settings import BudgetConfig
with Ledger(Path(sys.argv[1]), BudgetConfig()) as ledger:
    for i in range(10**9):
        ledger.reserve(f"{i:040x}", 1, "m", Charge(3, 2, 1))
        sys.stdout.write(f"{i}\\n")
        sys.stdout.flush()
        if i % 2:
            ledger.settle(f"{i:040x}", 1, Charge(1, 1, 1))
"""
FILL_THE_DISK = """
import resource, signal, sys
from pathlib import Path
from e5core.synth.ledger import Charge, Ledger
from e5core.synth.settings import BudgetConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger(Path(sys.argv[1]), BudgetConfig())
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
n = 0
try:
    while True:
        ledger.reserve(f"{n:040x}", 1, "m", Charge(3, 2, 1))
        n += 1
except OSError as error:
    sys.stdout.write(f"{n} {ledger.spent.requests} {error}")
"""


def ledger(path: Path, **budget: float) -> Ledger:
    return Ledger(path, BudgetConfig(**budget))


def test_a_reservation_is_in_the_file_before_reserve_returns(tmp_path: Path) -> None:
    with ledger(tmp_path / "l") as book:
        book.reserve("a1", 2, 'model "x" \u00e9', MOST)
        (line,) = (tmp_path / "l").read_bytes().splitlines()
        assert json.loads(line) == {
            "reserve": "a1",
            "attempt": 2,
            "model": 'model "x" \u00e9',
            "input": 100,
            "output": 50,
            "money": 7 * TRILLION,
        }


def test_answers_are_charged_exactly_and_the_unanswered_at_their_most_also_by_the_next_process(tmp_path: Path) -> None:
    with ledger(tmp_path / "l") as book:
        for key in ("answered", "timeout", "refused", "killed"):
            book.reserve(key, 1, "m", MOST)
        book.settle("answered", 1, Charge(10, 5, 3))
        book.settle("timeout", 1, None)
        book.settle("refused", 1, Charge(0, 0, 0))
        wanted = Spent(4, 10 + 100 + 0 + 100, 5 + 50 + 0 + 50, 3 + 2 * MOST.money)
        assert book.spent == wanted and book.n_open == 1
    with ledger(tmp_path / "l") as book:
        assert book.spent == wanted and book.spent_by_model() == {"m": wanted}
        assert (book.n_open, book.n_lost) == (0, 2)


def test_an_attempt_that_is_sent_again_by_the_next_process_is_charged_twice(tmp_path: Path) -> None:
    with ledger(tmp_path / "l") as book:
        book.reserve("a", 1, "m", MOST)
    with ledger(tmp_path / "l") as book:
        book.reserve("a", 1, "m", MOST)
        book.settle("a", 1, Charge(1, 1, 1))
        wanted = book.spent
        assert wanted == Spent(2, 101, 51, MOST.money + 1)
    with ledger(tmp_path / "l") as book:
        assert book.spent == wanted and book.n_lost == 1


@pytest.mark.parametrize(
    ("budget", "named"), [({"requests": 3}, "requests"), ({"tokens": 450}, "tokens"), ({"money": 21.0}, "money")]
)
def test_what_could_exceed_the_budget_is_refused_and_not_charged(tmp_path: Path, budget: dict, named: str) -> None:
    with ledger(tmp_path / "l", **budget) as book:
        for i in range(3):
            book.reserve(f"a{i}", 1, "m", MOST)
        before, size = book.spent, (tmp_path / "l").stat().st_size
        with pytest.raises(BudgetSpent, match=named):
            book.reserve("a3", 1, "m", Charge(1, 0, 1))
        assert book.spent == before and (tmp_path / "l").stat().st_size == size
    with ledger(tmp_path / "l", **budget) as book, pytest.raises(BudgetSpent):
        book.reserve("a3", 1, "m", Charge(1, 0, 1))


def test_a_settlement_makes_room_in_the_budget(tmp_path: Path) -> None:
    with ledger(tmp_path / "l", tokens=200) as book:
        book.reserve("a", 1, "m", MOST)
        with pytest.raises(BudgetSpent):
            book.reserve("b", 1, "m", MOST)
        book.settle("a", 1, Charge(25, 25, 0))
        book.reserve("b", 1, "m", MOST)


def test_any_order_of_work_stays_within_the_budget_and_reads_back_equal(tmp_path: Path) -> None:
    draw, open_, true_cost = random.Random(0), [], 0
    with ledger(tmp_path / "l", tokens=20_000, money=900.0) as book:
        for i in range(2000):
            most = Charge(draw.randint(0, 200), draw.randint(0, 100), draw.randint(0, 10 * TRILLION))
            cost = Charge(*(draw.randint(0, amount) for amount in most))
            attempt = draw.randint(1, 3)
            try:
                book.reserve(f"k{i}", attempt, "m", most)
            except BudgetSpent:
                pass
            else:
                true_cost += cost.money
                open_.append((f"k{i}", attempt, cost))
            if open_ and draw.random() < 0.6:
                key, attempt, cost = open_.pop(draw.randrange(len(open_)))
                book.settle(key, attempt, draw.choice((cost, cost, None)))
            spent = book.spent
            assert spent.input_tokens + spent.output_tokens <= 20_000 and true_cost <= spent.money <= 900 * TRILLION
    with ledger(tmp_path / "l") as book:
        assert book.spent == spent


def test_a_file_cut_at_any_byte_opens_with_its_whole_lines_and_goes_on(tmp_path: Path) -> None:
    with ledger(tmp_path / "l") as book:
        for i in range(3):
            book.reserve(f"a{i}", 1, "m", MOST)
            book.settle(f"a{i}", 1, Charge(1, 1, 1))
    data = (tmp_path / "l").read_bytes()
    for cut in range(len(data) + 1):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        whole = [json.loads(line) for line in data[:cut].splitlines(keepends=True) if line.endswith(b"\n")]
        n_reserved, n_settled = (sum(word in entry for entry in whole) for word in ("reserve", "settle"))
        with ledger(path) as book:
            tokens = 150 * (n_reserved - n_settled) + 2 * n_settled
            assert (book.spent.requests, sum(book.spent[1:3])) == (n_reserved, tokens)
            book.reserve("b", 1, "m", MOST)
        with ledger(path) as book:
            assert book.spent.requests == n_reserved + 1


@pytest.mark.parametrize("line", ['{"reserve":"a"', "[]", '{"settle":"x","attempt":1,"input":1,"output":1,"money":1}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    with ledger(tmp_path / "l") as book:
        book.reserve("a", 1, "m", MOST)
    with open(tmp_path / "l", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(RuntimeError, match=f"{tmp_path / 'l'}:2: not a line of a ledger"):
        ledger(tmp_path / "l")


def test_another_file_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("milk, eggs")
    with pytest.raises(RuntimeError, match="no ledger"):
        ledger(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "milk, eggs"


def test_one_process_at_a_time_holds_a_ledger(tmp_path: Path) -> None:
    with ledger(tmp_path / "l"):
        with pytest.raises(RuntimeError, match="in use"):
            ledger(tmp_path / "l")
    ledger(tmp_path / "l").close()


def test_misuse_is_refused(tmp_path: Path) -> None:
    with ledger(tmp_path / "l") as book:
        book.reserve("a", 1, "m", MOST)
        with pytest.raises(ValueError, match="on the way already"):
            book.reserve("a", 1, "m", MOST)
        with pytest.raises(ValueError, match="ASCII letters"):
            book.reserve('a"', 1, "m", MOST)
        with pytest.raises(KeyError, match="not reserved"):
            book.settle("b", 1, MOST)


def test_a_server_that_bills_beyond_the_reservation_is_charged_in_full_and_counted(tmp_path: Path) -> None:
    with ledger(tmp_path / "l") as book:
        book.reserve("a", 1, "m", MOST)
        book.settle("a", 1, Charge(100, 51, 7 * TRILLION))
        assert book.n_over == 1 and book.spent.output_tokens == 51


def test_prices_are_whole_and_never_rounded_down() -> None:
    exact = ModelConfig(name="m", price_in=0.15, price_out=0.6)
    assert price(exact, 1_000_000, 2_000_000) == Charge(1_000_000, 2_000_000, 1_350_000_000_000)
    assert price(ModelConfig(name="m", price_in=2.4, price_out=0.0375), 10, 10).money == 24_375_000
    assert price(ModelConfig(name="m", price_in=1e-7), 1, 0).money == 1


def test_a_full_disk_stops_the_run_and_leaves_whole_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path / "l")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    n, charged, said = run.stdout.split(" ", 2)
    assert n == charged and "bytes could be written" in said, run.stderr
    with ledger(tmp_path / "l") as book:
        assert book.spent.requests == int(n) > 0


def test_killed_at_any_moment_the_ledger_is_whole_and_holds_all_that_was_sent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RESERVE_FOR_EVER, str(tmp_path / "l")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(1000):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        n_sent = 1000 + len([line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")])
    with ledger(tmp_path / "l") as book:
        assert n_sent <= book.spent.requests <= n_sent + 1
        assert book.spent.input_tokens >= n_sent * 2


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    with ledger(tmp_path / "l") as book:
        for i in range(20_000):
            book.reserve(f"{i:040x}", 1, "m", MOST)
            book.settle(f"{i:040x}", 1, Charge(1, 1, 1))
    tracemalloc.start()
    with ledger(tmp_path / "l") as book:
        assert book.spent.requests == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
