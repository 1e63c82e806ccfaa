#include "file_bytes.hpp"

#include <fstream>

#include "error.hpp"

#if defined(__unix__) || defined(__APPLE__)
#define MIRROR_MAPS_FILES
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mirror {
namespace {

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& what) {
  throw Error(ErrorKind::bundle, path.string() + " " + what + "; export the bundle again");
}

Bytes read_bytes(const std::filesystem::path& path, std::uint64_t offset, std::uint64_t count) {
  const std::shared_ptr<std::byte[]> bytes(new std::byte[static_cast<std::size_t>(count)]);
  std::ifstream stream(path, std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(offset));
  if (!stream.read(reinterpret_cast<char*>(bytes.get()), static_cast<std::streamsize>(count)))
    refuse(path, "can't be read");
  return {bytes, bytes.get()};
}

#ifdef MIRROR_MAPS_FILES
// Null where the file can't be mapped.
Bytes map_bytes(const std::filesystem::path& path, std::uint64_t offset, std::uint64_t count) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return nullptr;
  const std::uint64_t before = offset % static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));  // pages are mapped whole
  const auto size = static_cast<std::size_t>(before + count);
  void* memory = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, static_cast<off_t>(offset - before));
  close(file);
  if (memory == MAP_FAILED) return nullptr;
  const std::shared_ptr<void> pages(memory, [size](void* first) { munmap(first, size); });
  return {pages, static_cast<const std::byte*>(memory) + before};
}
#endif

}  // namespace

Bytes file_bytes(const std::filesystem::path& path, std::uint64_t offset, std::uint64_t count) {
  std::error_code code;
  const std::uintmax_t size = std::filesystem::file_size(path, code);
  if (code) refuse(path, "can't be read");
  // Behind a mapped file's end there is no memory.
  if (offset > size || count > size - offset)
    refuse(path, "has " + std::to_string(size) + " bytes, and those from " + std::to_string(offset) + " to " +
                     std::to_string(offset + count) + " are wanted");
#ifdef MIRROR_MAPS_FILES
  if (Bytes mapped = map_bytes(path, offset, count)) return mapped;
#endif
  return read_bytes(path, offset, count);
}

}  // namespace mirror
