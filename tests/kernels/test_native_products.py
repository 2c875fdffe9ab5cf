"""What native products have beyond what every kernel has: threads, memory, a border."""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from kernels.weights import drawn, levels_of, matrix_of, require

from plyweight import native
from plyweight.codec import to_planes
from plyweight.kernels import pick
from plyweight.kernels.reference import error_bound, float_product, int8_product

VARIANTS = [name for name in native.KERNELS if name != native.REFERENCE]
variants = pytest.mark.parametrize("variant", VARIANTS)
built = pytest.mark.skipif(
    native.missing_because() is not None, reason=f"no library: {native.missing_because()}"
)


@variants
@pytest.mark.parametrize("m", [5, 6, 63, 64, 65, 130])
@pytest.mark.parametrize("group_size", [None, 512, 40])
def test_more_rows_and_inputs_than_are_computed_at_a_time_give_the_product(variant, m, group_size):
    require(variant)
    x, codes, scale = drawn(m, 35, 777, m=m, group_size=group_size)
    matrix = matrix_of(variant, codes, group_size=group_size)
    for bit_width in (1, 2, 5, 8):
        right = x, levels_of(codes, bit_width), scale, group_size
        y = matrix.product(x, scale, bit_width, mode="int8", num_threads=2)
        assert np.array_equal(y, int8_product(*right))
        y = matrix.product(x, scale, bit_width, mode="float", num_threads=2)
        assert (abs(y - float_product(*right).astype("f8")) <= error_bound(*right)).all()


def before_a_hole(array):
    """A copy of ``array`` that ends where the process may not read."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    found = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes)
    found[:] = array.ravel()
    return found.reshape(array.shape)


@variants
@pytest.mark.skipif(os.name != "posix", reason="there is no mprotect")
@pytest.mark.parametrize("group_size", [None, 24])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (5, 50), (40, 33)], ids=str)
def test_nothing_is_read_beyond_activations_scales_and_planes(variant, group_size, shape):
    require(variant)
    for m in (1, 2, 5, 8, 13):
        x, codes, scale = drawn(m, *shape, m=m, group_size=group_size)
        matrix = pick(variant).matrix(shape, group_size=group_size)
        for plane in to_planes(codes, 8):
            matrix.add_plane(before_a_hole(plane))
        for bit_width in (1, 4, 8):
            given = before_a_hole(x), before_a_hole(scale), bit_width
            right = x, levels_of(codes, bit_width), scale, group_size
            y = matrix.product(*given, mode="int8")
            assert np.array_equal(y, int8_product(*right))
            y = matrix.product(*given, mode="float")
            assert (abs(y - float_product(*right).astype("f8")) <= error_bound(*right)).all()


@variants
def test_a_row_is_the_same_whatever_rows_are_beside_it_in_the_float_mode_too(variant):
    require(variant)
    x, codes, scale = drawn(1, 40, 300, m=23, group_size=64)
    matrix = matrix_of(variant, codes, group_size=64)
    for bit_width in (2, 8):
        y = matrix.product(x, scale, bit_width, mode="float", num_threads=2)
        for m in range(1, 10):
            part = matrix.product(x[:m].copy(), scale, bit_width, mode="float")
            assert np.array_equal(part, y[:m])


@variants
def test_products_go_on_while_other_planes_come_and_go(variant):
    require(variant)
    x, codes, scale = drawn(2, 96, 2048, m=2)
    planes = to_planes(codes, 8)
    matrix = matrix_of(variant, codes, num_planes=3)
    expected = int8_product(x, levels_of(codes, 3), scale)
    stopped = threading.Event()

    def multiply():
        right = 0
        while not stopped.is_set():
            y = matrix.product(x, scale, 3, mode="int8", num_threads=2)
            right += 1 if np.array_equal(y, expected) else -(10**9)
        return right

    with ThreadPoolExecutor(3) as threads:
        counts = [threads.submit(multiply) for _ in range(3)]
        for _ in range(50):
            for plane in planes[3:]:
                matrix.add_plane(plane)
            for _ in planes[3:]:
                matrix.drop_plane()
        stopped.set()
    assert all(count.result() > 0 for count in counts)
    assert matrix.num_planes == 3


@built
def test_a_plane_that_a_product_computes_with_is_freed_when_it_is_done():
    library, variant = native.library(), native.choose().variant
    codes = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    matrix = library.PlaneMatrix(64, 64, 0)
    for plane in to_planes(codes, 8)[:2]:
        matrix.add_plane(plane)
    failures, x = [], np.ones((1, 64), np.float32)
    scale = matrix.tiled_scales(np.ones(64, np.float32))

    def multiply():
        for _ in range(3000):
            try:
                matrix.product(x, scale, 1.0, 2, "int8", variant, 1)
            except ValueError as error:  # its second plane is just not there
                failures.append(str(error))

    thread = threading.Thread(target=multiply)
    thread.start()
    while thread.is_alive():
        matrix.drop_plane()
        matrix.add_plane(to_planes(codes, 8)[1])
    thread.join()
    assert set(failures) <= {"2 planes were asked for; 1 are held"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@built
def test_a_child_of_fork_has_threads_of_its_own():
    x, codes, scale = drawn(4, 256, 1024, m=4)
    matrix = matrix_of(native.available()[0], codes)
    expected = matrix.product(x, scale, 4, mode="int8", num_threads=2)  # starts the threads
    child = os.fork()
    if child == 0:
        again = [matrix.product(x, scale, 4, mode="int8", num_threads=2) for _ in range(20)]
        os._exit(0 if all(np.array_equal(y, expected) for y in again) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# In a process of its own, where no other library has threads that come, go or are bound.
WAKING = """
import os, time
from pathlib import Path

import numpy as np
from plyweight import native
from plyweight.kernels import pick

matrix = pick(native.available()[0]).matrix((256, 1024))
matrix.add_plane(np.zeros(256 * 128, np.uint8))
x, scale = np.ones((8, 1024), np.float32), np.ones(256, np.float32)


def threads():
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def wake_up():
    for _ in range(10):
        y = matrix.product(x, scale, 1, mode="int8", num_threads=3)
        assert (y == 64 * 1024).all()
        time.sleep(0.005)  # they sleep, and the next product wakes them


def wait_for(mask):
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if all(os.sched_getaffinity(thread) == mask for thread in pool):
            return
        time.sleep(0.01)
    raise SystemExit(f"not {mask}: {[os.sched_getaffinity(thread) for thread in pool]}")


everywhere, others = os.sched_getaffinity(0), threads()
one = {min(everywhere)}
if IS_LIMITED:
    os.sched_setaffinity(0, one)
wake_up()
pool = threads() - others
assert len(pool) == 2, pool
wait_for(one if IS_LIMITED else everywhere)
for thread in pool:
    os.sched_setaffinity(thread, one)
wake_up()
wait_for(one)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not known")
@pytest.mark.parametrize("is_limited", [False, True], ids=["all", "one"])
@built
def test_threads_may_run_where_they_could_before_they_were_woken_on_another_processor(is_limited):
    code = f"IS_LIMITED = {is_limited}\n{WAKING}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is not known")
@built
def test_an_upgrade_takes_the_memory_of_its_planes_and_a_downgrade_gives_it_back():
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    shape, plane = (4096, 8192), np.zeros(4096 * 8192 // 8, np.uint8)
    matrix = native.library().PlaneMatrix(*shape, 128)
    for _ in range(2):
        matrix.add_plane(plane)
    assert matrix.nbytes == 2 * plane.nbytes
    before = resident()
    for _ in range(6):
        matrix.add_plane(plane)
    grown = resident() - before
    for _ in range(6):
        matrix.drop_plane()
    left = resident() - before
    # Besides planes, half a plane for whatever else the process does meanwhile.
    assert abs(grown - 6 * plane.nbytes) < plane.nbytes / 2
    assert abs(left) < plane.nbytes / 2


# What a process of its own prints: huge pages, in KiB, of memory that asks for them, and of planes.
HUGE_PAGES = """
import mmap, re
import numpy as np
from plyweight import native

def huge():
    return int(re.search(r"AnonHugePages: *(\\d+) kB", open("/proc/self/smaps_rollup").read())[1])

before = huge()
control = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
control.madvise(mmap.MADV_HUGEPAGE)
control.write(bytes(16 << 20))
of_control, before = huge() - before, huge()
matrix = native.library().PlaneMatrix(4096, 4096, 0)
for _ in range(8):
    matrix.add_plane(np.zeros(2 << 20, np.uint8))
print(of_control, huge() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="pages are not known")
@built
def test_planes_that_begin_at_different_places_of_a_page_still_are_in_huge_pages():
    done = subprocess.run([sys.executable, "-c", HUGE_PAGES], capture_output=True, check=True)
    of_control, of_planes = map(int, done.stdout.split())
    if of_control < 14 << 10:
        pytest.skip(f"of 16 MiB that ask for huge pages, {of_control} KiB are in such")
    assert of_planes >= 12 << 10  # a place in memory may be short of them, as for the control


# --- the border ---------------------------------------------------------------------------------


@pytest.fixture
def matrix():
    found = native.library().PlaneMatrix(10, 24, 8)
    for plane in to_planes(np.zeros((10, 24), np.uint8), 8)[:3]:
        found.add_plane(plane)
    return found


X, SCALE = np.ones((4, 24), np.float32), np.ones(30, np.float32)
NOT_ALIGNED = np.frombuffer(b"-" + X.tobytes(), "f4", 96, 1).reshape(4, 24)


@built
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": X[:, :23].copy()}, "23 inputs; the weight takes 24"),
        ({"bits": 4}, "4 planes were asked for; 3 are held"),
        ({"bits": 0}, "0 bits; a code has 1 to 8"),
        ({"bits": 9}, "9 bits; a code has 1 to 8"),
        ({"mode": "int4"}, "the mode is int4; give int8 or float"),
        ({"num_threads": 0}, "0 threads"),
        ({"x": NOT_ALIGNED}, "not aligned"),
        ({"x": X.astype(np.float64)}, None),
        ({"x": X[0]}, None),
        ({"x": np.asfortranarray(X)}, None),
        ({"x": np.repeat(X, 2, axis=0)[::2]}, None),
        ({"x": None}, None),
        ({"scales": SCALE}, None),
        ({"scales": None}, None),
    ],
)
def test_a_wrong_argument_of_a_product_is_refused(matrix, change, words):
    scale = matrix.tiled_scales(SCALE)
    arguments = {"x": X, "scales": scale, "gain": 1.0, "bits": 3, "mode": "int8"}
    arguments |= {"num_threads": 1} | change
    with pytest.raises(TypeError if words is None else ValueError, match=words):
        matrix.product(variant=native.choose().variant, **arguments)


@built
def test_a_scale_that_does_not_fit_is_refused(matrix):
    with pytest.raises(ValueError, match="10 scales; the weight has 30"):
        matrix.tiled_scales(SCALE[:10].copy())
    not_aligned = np.frombuffer(b"-" + SCALE.tobytes(), "f4", 30, 1)
    with pytest.raises(ValueError, match="not aligned"):
        matrix.tiled_scales(not_aligned)
    for wrong in (SCALE.astype(np.float64), SCALE.reshape(10, 3), np.repeat(SCALE, 2)[::2], None):
        with pytest.raises(TypeError):
            matrix.tiled_scales(wrong)
    for shape, num_scales in (((10, 24, 24), 10), ((30, 24, 0), 30), ((11, 24, 8), 33)):
        other = native.library().PlaneMatrix(*shape)
        scale = other.tiled_scales(np.ones(num_scales, np.float32))
        with pytest.raises(ValueError, match="of another matrix"):
            matrix.product(X, scale, 1.0, 3, "int8", native.choose().variant, 1)


@built
def test_a_plane_that_was_made_ready_is_for_one_place_alone(matrix):
    plane = np.zeros(30, np.uint8)
    for index in (-1, 8):
        with pytest.raises(ValueError, match=f"there is no plane {index}"):
            matrix.ready_plane(plane, index)
    fifth = matrix.ready_plane(plane, 4)
    with pytest.raises(ValueError, match="ready as number 4; the next one is 3"):
        matrix.add_ready(fifth)
    matrix.add_plane(plane)
    matrix.add_ready(fifth)
    with pytest.raises(ValueError, match="ready as number 4; the next one is 5"):
        matrix.add_ready(fifth)
    with pytest.raises(ValueError, match="1 planes were asked for; 0 are held"):
        native.library().PlaneMatrix(10, 24, 8).ready_plane(plane, 1)


@built
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_rows_that_there_are_not_have_no_levels(matrix, bits):
    variant = native.choose().variant
    assert matrix.levels(bits, 3, 3, variant, 1).shape == (0, 24)
    for start, stop in ((0, 11), (5, 4), (11, 11)):
        with pytest.raises(ValueError, match="there are 10"):
            matrix.levels(bits, start, stop, variant, 1)
    with pytest.raises(TypeError):
        matrix.levels(bits, -1, 3, variant, 1)


@built
def test_a_plane_that_does_not_fit_is_refused(matrix):
    right = np.zeros(30, np.uint8)
    for wrong in (right[:29].copy(), np.zeros(31, np.uint8)):
        with pytest.raises(ValueError, match="this matrix has planes of 30"):
            matrix.add_plane(wrong)
    for wrong in (right.astype(np.int8), right.reshape(2, 15), np.zeros(60, np.uint8)[::2]):
        with pytest.raises(TypeError):
            matrix.add_plane(wrong)
    for _ in range(5):
        matrix.add_plane(right)
    with pytest.raises(ValueError, match="8 planes are held"):
        matrix.add_plane(right)
    for _ in range(8):
        matrix.drop_plane()
    with pytest.raises(ValueError, match="no plane to drop"):
        matrix.drop_plane()
    for index in (-1, 0, 8):
        with pytest.raises(ValueError, match="plane"):
            matrix.plane(index)


@built
def test_a_weight_without_a_side_and_sums_too_long_for_32_bits_are_refused():
    library, variant = native.library(), native.choose().variant
    for shape in ((0, 4), (4, 0), (2**31 + 1, 1), (1, 2**40)):
        with pytest.raises(ValueError, match="sides of 1 to"):
            library.PlaneMatrix(*shape, 0)
    long = library.PlaneMatrix(1, 2**17 + 1, 0)
    long.add_plane(np.zeros(2**14 + 1, np.uint8))
    x = np.ones((1, 2**17 + 1), np.float32)
    scale = long.tiled_scales(np.ones(1, np.float32))
    with pytest.raises(ValueError, match="131073 inputs share a scale"):
        long.product(x, scale, 1.0, 1, "int8", variant, 1)
    assert long.product(x, scale, 1.0, 1, "float", variant, 1)[0, 0] == 64 * x.size
