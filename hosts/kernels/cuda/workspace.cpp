#include "workspace.hpp"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace mirror_gpu {
namespace {

struct Kept {
  std::mutex mutex;
  std::map<std::pair<int, Stream>, Workspace> workspaces;
  std::size_t most_sums = 0, most_tickets = 1;
};

Kept& kept() {
  static Kept* const made = new Kept;  // sessions may end after static objects do
  return *made;
}

}  // namespace

void plan_workspace(std::size_t sums, std::size_t tickets) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.most_sums = std::max(all.most_sums, sums);
  all.most_tickets = std::max(all.most_tickets, tickets);
}

Workspace workspace(int gpu, Stream stream) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Workspace& found = all.workspaces[{gpu, stream}];
  if (found.sums < all.most_sums || found.tickets < all.most_tickets || found.tickets_at == 0) {
    found.sums = all.most_sums;
    found.tickets = all.most_tickets;
    found.sums_at = all.most_sums > 0 ? allocate(all.most_sums * sizeof(float)) : 0;
    found.tickets_at = allocate(all.most_tickets * sizeof(int));
    clear(found.tickets_at, all.most_tickets * sizeof(int), stream);
  }
  return found;
}

}  // namespace mirror_gpu
