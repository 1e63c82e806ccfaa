// Parts of files in memory: mapped where the system can, so that what nobody looks at is never read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>

namespace mirror {

using Bytes = std::shared_ptr<const std::byte>;

// `count` bytes of a file from `offset` on. Throws Error(bundle) if it doesn't have them.
Bytes file_bytes(const std::filesystem::path& path, std::uint64_t offset, std::uint64_t count);

}  // namespace mirror
