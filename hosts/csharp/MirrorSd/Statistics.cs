using System.Runtime.InteropServices;

namespace MirrorSd
{
    /// <summary>Counts and times of one answer. Ratios are NaN where there is nothing to divide by; times are means
    /// over all rounds.</summary>
    public sealed class Statistics
    {
        private readonly Native.Statistics _found;

        internal Statistics(Native.AnswerHandle answer)
        {
            _found = new Native.Statistics { StructSize = (uint)Marshal.SizeOf<Native.Statistics>() };
            Interop.Check(Native.mirror_answer_statistics(answer, ref _found));
        }

        /// <summary>Tokens of the prompt.</summary>
        public int PromptTokens => _found.PromptTokens;

        /// <summary>Those that the cache already held.</summary>
        public int ReusedPromptTokens => _found.ReusedPromptTokens;

        /// <summary>Tokens of the answer.</summary>
        public int GeneratedTokens => _found.GeneratedTokens;

        /// <summary>Verifications, plain passes included.</summary>
        public int Rounds => _found.Rounds;

        /// <summary>Draft tokens that were verified.</summary>
        public int DraftTokensProposed => _found.DraftTokensProposed;

        /// <summary>Those that stood.</summary>
        public int DraftTokensAccepted => _found.DraftTokensAccepted;

        /// <summary>Passes over the target, those of the prompt included.</summary>
        public int TargetForwardPasses => _found.TargetForwardPasses;

        /// <summary>Outcomes that no branch fitted.</summary>
        public int Redrafts => _found.Redrafts;

        /// <summary>Accepted / proposed.</summary>
        public double AcceptanceRate => _found.AcceptanceRate;

        /// <summary>Committed tokens / rounds.</summary>
        public double TokensPerRound => _found.TokensPerRound;

        /// <summary>Outcomes whose branch was ready / outcomes that wanted one.</summary>
        public double ReuseRate => _found.ReuseRate;

        /// <summary>Mean branches begun, over the rounds with a rollout.</summary>
        public double BranchesPerRound => _found.BranchesPerRound;

        /// <summary>Seconds from the request to the first token.</summary>
        public double TtftS => _found.TtftS;

        /// <summary>Tokens after the first / time in rounds.</summary>
        public double DecodeTokensPerS => _found.DecodeTokensPerS;

        /// <summary>The share of the draft's time that the target did not wait for.</summary>
        public double DraftHidden => _found.DraftHidden;

        /// <summary>Mean time of a round.</summary>
        public double RoundMs => _found.RoundMs;

        /// <summary>The target's layers below the exit.</summary>
        public double PrefixMs => _found.PrefixMs;

        /// <summary>The exit head.</summary>
        public double ExitHeadMs => _found.ExitHeadMs;

        /// <summary>The rest of the target.</summary>
        public double SuffixMs => _found.SuffixMs;

        /// <summary>The draft over the window.</summary>
        public double TrunkMs => _found.TrunkMs;

        /// <summary>The draft over the branches.</summary>
        public double RolloutMs => _found.RolloutMs;

        /// <summary>The draft with the target waiting.</summary>
        public double ProposeMs => _found.ProposeMs;

        /// <summary>The draft's thread waiting for the exit's candidates.</summary>
        public double CandidateWaitMs => _found.CandidateWaitMs;

        /// <summary>The target's thread waiting for a rollout.</summary>
        public double RolloutWaitMs => _found.RolloutWaitMs;

        /// <summary>The target's thread waiting for a proposal.</summary>
        public double RedraftMs => _found.RedraftMs;

        /// <summary>What remains of the target's thread's time, choosing tokens included.</summary>
        public double HostMs => _found.HostMs;
    }

    /// <summary>One round as it went.</summary>
    public sealed class Round
    {
        internal Round(Native.Round found)
        {
            Mode = found.Mode;
            Proposed = found.Proposed;
            Accepted = found.Accepted;
            Committed = found.Committed;
            Branches = found.Branches;
            Reused = found.WantedBranch != 0 ? found.Reused != 0 : (bool?)null;
            DurationMs = found.DurationMs;
        }

        /// <summary>The mode it ran in.</summary>
        public Mode Mode { get; }

        /// <summary>Draft tokens in the window.</summary>
        public int Proposed { get; }

        /// <summary>Draft tokens kept.</summary>
        public int Accepted { get; }

        /// <summary>Tokens that reached the text.</summary>
        public int Committed { get; }

        /// <summary>Branches begun by the rollout.</summary>
        public int Branches { get; }

        /// <summary>Whether a branch fitted; null where none was wanted.</summary>
        public bool? Reused { get; }

        /// <summary>How long it took.</summary>
        public double DurationMs { get; }
    }
}
