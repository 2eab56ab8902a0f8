"""Build: folder names to import names, and the C++ module freemerge.kernels._cpu. The rest is in pyproject.toml."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.modified import newer_group

# Each file of csrc/cpu is compiled once for each of these, into the C++ namespace of that name
# (csrc/include/freemerge/isa.h). `portable` comes first: where two objects hold the same inline function, the linker
# keeps the first, which runs anywhere.
X86_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
FLAGS = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"portable": []}

# No silent fused multiply-add: the same recipe gives the same bytes with every instruction set. Code that wants one
# says so.
# Vectors are passed by value between inline functions alone, so that their calling convention (psabi) does not matter.
COMMON = ["-Wno-psabi", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]


HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("bindings/*.h"))


class BuildEachInstructionSet(build_ext):
    def finalize_options(self):
        super().finalize_options()
        # `pip install -e .` would compile in a directory of its own, and the next build everything once more.
        self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extension(self, extension):
        kernels = sorted(glob("csrc/cpu/*.cpp"))
        jobs = [(isa, flags, source) for isa, flags in FLAGS.items() for source in kernels]

        def compile_one(job):
            isa, flags, source = job
            kept = os.path.join(self.build_temp, isa, source.removesuffix(".cpp") + ".o")
            if not newer_group([source, *HEADERS], kept):
                return kept
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("FREEMERGE_ISA", isa)],
                include_dirs=["csrc/include"],
                extra_postargs=["-std=c++17", "-fvisibility=hidden", *COMMON, *flags],
            )[0]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            extension.extra_objects = list(pool.map(compile_one, jobs))
        super().build_extension(extension)


def needs_recompile(object_file, source):
    return newer_group([source, *HEADERS], object_file)


ParallelCompile(default=0, needs_recompile=needs_recompile).install()


def packages():
    roots = {"freemerge": "engine", "freemerge.kernels": "kernels", "freemerge.csrc": "csrc"}
    found = []
    for name, folder in roots.items():
        found += [name, *(f"{name}.{package}" for package in find_packages(folder))]
    return roots, found


CPP = Pybind11Extension(
    "freemerge.kernels._cpu",
    sorted(glob("bindings/*.cpp") + glob("csrc/runtime/*.cpp")),
    include_dirs=["csrc/include", "bindings"],
    depends=sorted(HEADERS + glob("csrc/cpu/*.cpp")),
    extra_compile_args=COMMON,
    extra_link_args=["-pthread"],
    cxx_std=17,
)

roots, found = packages()
setup(
    package_dir=roots,
    packages=found,
    package_data={
        "freemerge": ["py.typed"],
        "freemerge.kernels": ["*.pyi"],
        "freemerge.csrc": ["**/*.h", "**/*.cu", "**/*.cpp"],
    },
    include_package_data=False,
    # `make` compiles beside the installation
    ext_modules=[] if os.environ.get("FREEMERGE_WITHOUT_CPP") else [CPP],
    cmdclass={"build_ext": BuildEachInstructionSet},
)
