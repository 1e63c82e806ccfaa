// A draft that is a language model on a device, with the tree layout of docs/bundle.md, lookahead
// streams and fed features where it has them.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "device.hpp"
#include "draft.hpp"
#include "lookahead.hpp"
#include "pace.hpp"
#include "pass_pool.hpp"
#include "spans.hpp"

namespace mirror {

struct DraftShape {
  int capacity;
  int max_positions;
  int vocab_size;         // its own vocabulary; the first stream's id
  int target_vocab_size;  // tokens past it are never proposed
  int prefill_chunk;
  std::vector<int> tokens_per_pass;           // of a rollout
  std::vector<int> branches_per_pass;         // the likeliest; see branches_at
  std::vector<int> proposal_tokens_per_pass;  // of a proposal, while the target waits for it
  std::size_t state_bytes = 0;                // of one fed row; 0 where no features are fed
  bool adapts = false;                        // rollouts take fewer branches where they end late
};

// Invariant: slots below filled_ hold the rows of the tokens given last, with one exception that every
// entry point repairs first: rows of draft tokens which the target then refused. They start at the
// context's last token but one at the earliest, so keeping length - 1 rows is safe.
class ModelDraft final : public Draft {
 public:
  ModelDraft(std::unique_ptr<Segment> trunk, std::unique_ptr<Segment> branch, DraftShape shape, CandidateSource source,
             std::vector<int> fanout);

  void keep(int length) override;
  void see_states(int start, const States& states) override;
  void read(const Tokens& tokens) override;
  Proposal propose(const Tokens& tokens, int count, const std::optional<CoupledNoise>& noise) override;
  Rollout roll_out(const Tokens& tokens, const Tokens& window, int depth, Meeting& meeting,
                   const std::optional<CoupledNoise>& noise) override;

 private:
  using Noise = std::optional<CoupledNoise>;
  using Places = std::vector<std::int64_t>;

  struct Pass {
    Pass(int width, int max_positions, SlotBranches slots) : feeds(width, max_positions, std::move(slots)) {}
    PassFeeds feeds;
    std::map<int, std::unique_ptr<BoundPass>> trunk, branch;  // by wanted rows
  };

  // The branches that a rollout still continues, the likeliest first, and what the next pass reads of each.
  struct Alive {
    std::vector<int> rows;
    std::vector<Tokens> tokens;        // per row; empty while they are on the device alone
    std::optional<LaunchedIds> given;  // where they are then, from `first` on, row after row
    int first = 0;

    // Leaves some of the branches; `read`: tokens of each that are to be read.
    void keep(std::size_t place, std::size_t count, int read);
  };

  // What a pass gave each of some branches, [branches, gives]; on its way where passes are only launched.
  struct Given {
    std::vector<int> rows;
    int gives;
    Tokens tokens;
    std::shared_ptr<SentIds> sent;
    std::optional<LaunchedIds> launched;

    const Token* wait() const { return sent ? sent->wait() : tokens.data(); }
  };

  // A rollout, for the next one to learn from.
  struct Ended {
    std::shared_ptr<const Meeting::Decided> decided;
    Clock::time_point start, end;
  };

  void learn_pace();
  void know(int count);
  void wait_states(int base, Meeting& meeting);
  std::vector<Branch> branches(const Tokens& window, Candidates own, Meeting& meeting, const Noise& noise);
  Given advance(const Tokens& tokens, int gives, const Noise& noise);
  Given go_on(const Given& last, int gives, const Noise& noise);
  Given step(const Token* tokens, int count, const std::optional<LaunchedIds>& launched, int gives, int width,
             const Noise& noise);
  Candidates run_trunk(const Tokens& window, bool drawn);
  bool narrow(Alive& alive, std::size_t number, int read, const std::vector<Branch>& branches, Meeting& meeting) const;
  void continue_all(Rollout& rollout, int base, int depth, Meeting& meeting, const Noise& noise);
  Given branch_pass(const BranchPass& item, const Alive& alive, const std::vector<Branch>& branches, int base, int read,
                    int& slot, const Noise& noise);
  static void hand_on(const Given& pass, Alive& alive);
  Given give(Pass& pass, const std::vector<BranchRow>& rows, int wanted, int past, const Noise& noise);
  Tokens choose(Pass& pass, const std::vector<BranchRow>& rows, int wanted, int past, const Noise& noise);
  // `drawn`: whether noise will be added to them.
  Candidates candidates(Pass& pass, int wanted, int past, bool drawn);
  BoundPass& run(Pass& pass, bool with_candidates, int wanted, int past);
  void feed_states(PassFeeds& feeds, std::size_t rows, const std::vector<BranchRow>* branch_rows) const;
  Pass& pass_at(int width);
  Token embeddable(Token token) const;
  bool known(Token token) const { return token >= 0 && token < shape_.target_vocab_size; }

  std::unique_ptr<Segment> trunk_, branch_;
  DraftShape shape_;
  CandidateSource source_;
  std::vector<int> fanout_;
  std::shared_ptr<KVCache> cache_;
  SlotBranches slots_;
  PassPool<Pass> pool_;
  SpanLog log_;
  std::vector<std::byte> states_;  // the exit layer's state at every position, where they are fed
  int filled_ = 0;
  int known_states_ = 0;  // positions whose state is that of the context
  std::optional<BranchPace> pace_;
  std::optional<Ended> last_;
};

}  // namespace mirror
