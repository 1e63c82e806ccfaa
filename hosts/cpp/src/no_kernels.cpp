// In place of hosts/kernels, where they can't be compiled: no CPU has any.
#include "kernels/draft_pass.h"

extern "C" {

const char* mirror_kernels_of(const char*) { return nullptr; }

mirror_draft* mirror_draft_open(const mirror_draft_facts*, const char*) { return nullptr; }
void mirror_draft_close(mirror_draft*) {}

mirror_draft_team* mirror_draft_team_open(int32_t, int32_t) { return nullptr; }
void mirror_draft_team_close(mirror_draft_team*) {}

int32_t mirror_draft_run(const mirror_draft*, mirror_draft_team*, const mirror_draft_pass*) { return 1; }
}
