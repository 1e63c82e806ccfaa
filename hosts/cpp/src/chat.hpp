// The model's chat format: a conversation as the text that the model was trained on. Pure.
#pragma once

#include <ctime>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace mirror {

struct Message {
  std::string role, content;  // UTF-8
};

// Messages as prompt text, ending where the assistant's answer begins. The bundle's data says it all
// (docs/bundle.md). Throws Error(request) for what that doesn't cover.
std::string render_chat(const std::optional<ChatFormat>& format, const std::vector<Message>& messages,
                        const std::tm& today);

// The day it is, in local time.
std::tm local_day();

}  // namespace mirror
