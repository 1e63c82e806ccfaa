// SHA-256 (FIPS 180-4) of a file, for checking a bundle without a cryptography library.
#pragma once

#include <filesystem>
#include <string>

namespace mirror {

// The hex digest. Throws Error(bundle) if the file can't be read.
std::string file_sha256(const std::filesystem::path& path);

}  // namespace mirror
