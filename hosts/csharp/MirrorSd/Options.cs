using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;

namespace MirrorSd
{
    /// <summary>How tokens are made. The text is the same in every mode.</summary>
    public enum Mode
    {
        /// <summary>Not said: the bundle's setting, else mirror.</summary>
        Unset = 0,

        /// <summary>One token per pass of the target.</summary>
        Plain = 1,

        /// <summary>Draft, then verify.</summary>
        Serial = 2,

        /// <summary>Both at once.</summary>
        Mirror = 3,
    }

    /// <summary>Where the branches' first tokens come from.</summary>
    public enum Candidates
    {
        /// <summary>Not said: the bundle's setting, else the draft's odds, with n-grams both.</summary>
        Unset = 0,

        /// <summary>The target's exit head.</summary>
        Exit = 1,

        /// <summary>The draft's own odds.</summary>
        Draft = 2,

        /// <summary>Both, rank by rank.</summary>
        Both = 3,
    }

    /// <summary>Why an answer ended.</summary>
    public enum FinishReason
    {
        /// <summary>It goes on.</summary>
        Unset = 0,

        /// <summary>An end token or a stop string.</summary>
        Stop = 1,

        /// <summary>A length limit.</summary>
        Length = 2,

        /// <summary>The caller's wish, or an error.</summary>
        Cancelled = 3,
    }

    /// <summary>Choices that hold as long as a bundle is loaded. Null and Unset take the bundle's setting, else the
    /// default that is named.</summary>
    public sealed class LoadOptions
    {
        /// <summary>How tokens are made; in plain mode the draft isn't loaded. Else mirror.</summary>
        public Mode Mode { get; set; }

        /// <summary>Where the branches' first tokens come from. Else both.</summary>
        public Candidates Candidates { get; set; }

        /// <summary>CPU threads in all. Else one per physical core.</summary>
        public int? Threads { get; set; }

        /// <summary>Tokens that a context may have. Else the bundle's.</summary>
        public int? MaxLength { get; set; }

        /// <summary>Draft tokens of a window. Else the bundle's.</summary>
        public int? Gamma { get; set; }

        /// <summary>Branches that leave after each window position. Else the bundle's.</summary>
        public int? Kappa { get; set; }

        /// <summary>The same by position, Gamma + 1 counts; overrides Kappa.</summary>
        public IReadOnlyList<int> Fanout { get; set; }

        /// <summary>Tokens that each of a rollout's passes gives a branch; the last number repeats. Else 1.</summary>
        public IReadOnlyList<int> TokensPerPass { get; set; }

        /// <summary>Branches that take part in each of these passes at most, the likeliest; counts never rise, and the
        /// last one repeats. Else the bundle's where TokensPerPass isn't said either, else all.</summary>
        public IReadOnlyList<int> BranchesPerPass { get; set; }

        /// <summary>As TokensPerPass, for proposals that the target waits for. Else the bundle's where TokensPerPass
        /// isn't said either, else as for rollouts.</summary>
        public IReadOnlyList<int> ProposalTokensPerPass { get; set; }

        /// <summary>Tokens of a context's end that the draft reads at most, 2 or more. Else the bundle's, else
        /// all.</summary>
        public int? DraftContext { get; set; }

        /// <summary>Where the target runs: cpu, cuda:0, openvino:CPU, openvino:GPU, openvino:NPU. Else cpu.</summary>
        public string TargetDevice { get; set; }

        /// <summary>Where the target's layers past the exit run. Else the target's device.</summary>
        public string SuffixDevice { get; set; }

        /// <summary>Where the draft runs. Else cpu.</summary>
        public string DraftDevice { get; set; }

        /// <summary>Whether every pass of the target after prefill has one width, so that the text is the same in
        /// every mode at any precision.</summary>
        public bool Pinned { get; set; }

        /// <summary>Whether the sha256 of every file is checked; sizes always are.</summary>
        public bool VerifyHashes { get; set; }

        /// <summary>How long to wait for the draft before going on without it.</summary>
        public TimeSpan DraftTimeout { get; set; } = TimeSpan.FromSeconds(30);

        /// <summary>The most tokens that an n-gram draft looks up at once.</summary>
        public int MaxNgramSize { get; set; } = 3;

        internal Native.LoadOptions ToNative(NativeMemory memory)
        {
            Native.mirror_load_options_init_sized(out var options, (UIntPtr)Marshal.SizeOf<Native.LoadOptions>());
            options.Mode = Mode;
            options.Candidates = Candidates;
            options.Threads = Said(Threads, nameof(Threads));
            options.MaxLength = Said(MaxLength, nameof(MaxLength));
            options.Gamma = Said(Gamma, nameof(Gamma));
            options.Kappa = Said(Kappa, nameof(Kappa));
            options.Fanout = memory.Numbers(Fanout);
            options.FanoutCount = (UIntPtr)(Fanout?.Count ?? 0);
            options.TokensPerPass = memory.Numbers(TokensPerPass);
            options.TokensPerPassCount = (UIntPtr)(TokensPerPass?.Count ?? 0);
            options.BranchesPerPass = memory.Numbers(BranchesPerPass);
            options.BranchesPerPassCount = (UIntPtr)(BranchesPerPass?.Count ?? 0);
            options.ProposalTokensPerPass = memory.Numbers(ProposalTokensPerPass);
            options.ProposalTokensPerPassCount = (UIntPtr)(ProposalTokensPerPass?.Count ?? 0);
            options.DraftContext = Said(DraftContext, nameof(DraftContext));
            options.TargetDevice = memory.Text(TargetDevice);
            options.SuffixDevice = memory.Text(SuffixDevice);
            options.DraftDevice = memory.Text(DraftDevice);
            options.Pinned = Pinned ? 1 : 0;
            options.VerifyHashes = VerifyHashes ? 1 : 0;
            options.DraftTimeoutS = DraftTimeout.TotalSeconds;
            options.MaxNgramSize = MaxNgramSize;
            return options;
        }

        // Zero means "not said" to the native library, so a zero that was said is refused here.
        internal static int Said(int? value, string name)
        {
            if (value == 0)
            {
                throw new MirrorException(ErrorCode.Request, $"{name} is 0; it must be 1 or more");
            }
            return value ?? 0;
        }
    }

    /// <summary>Choices for one answer.</summary>
    public sealed class GenerateOptions
    {
        /// <summary>How tokens are made; Unset takes the engine's mode.</summary>
        public Mode Mode { get; set; }

        /// <summary>The most tokens of the answer.</summary>
        public long MaxNewTokens { get; set; } = 128;

        /// <summary>0 is greedy.</summary>
        public double Temperature { get; set; }

        /// <summary>Keep tokens no less likely than this many; 0 keeps all.</summary>
        public long TopK { get; set; }

        /// <summary>Keep the fewest likeliest tokens whose mass reaches it; 1 keeps all.</summary>
        public double TopP { get; set; } = 1.0;

        /// <summary>Keep tokens at least this times as likely as the likeliest; 0 keeps all.</summary>
        public double MinP { get; set; }

        /// <summary>Lowers the odds of tokens that the context holds; 1 doesn't.</summary>
        public double RepetitionPenalty { get; set; } = 1.0;

        /// <summary>Same seed, same text, in every mode.</summary>
        public ulong Seed { get; set; }

        /// <summary>Texts that end the answer and are left out of it.</summary>
        public IReadOnlyList<string> Stop { get; set; }

        /// <summary>The most draft tokens of a round; null takes the engine's.</summary>
        public int? NumAssistantTokens { get; set; }

        /// <summary>Whether what the prompt has in common with the last context stays in the cache.</summary>
        public bool ReuseCache { get; set; }

        /// <summary>Whether text is made also where the prompt is token ids.</summary>
        public bool Text { get; set; }

        /// <summary>For a prompt that is text: whether the tokenizer's special tokens are put around it. False for
        /// a prompt in the model's chat format, which brings its own.</summary>
        public bool AddSpecialTokens { get; set; } = true;

        internal Native.GenerateOptions ToNative(NativeMemory memory)
        {
            Native.mirror_generate_options_init(out var options);
            options.Mode = Mode;
            options.MaxNewTokens = MaxNewTokens;
            options.Temperature = Temperature;
            options.TopK = TopK;
            options.TopP = TopP;
            options.MinP = MinP;
            options.RepetitionPenalty = RepetitionPenalty;
            options.Seed = Seed;
            options.Stop = memory.Texts(Stop);
            options.StopCount = (UIntPtr)(Stop?.Count ?? 0);
            options.NumAssistantTokens = LoadOptions.Said(NumAssistantTokens, nameof(NumAssistantTokens));
            options.ReuseCache = ReuseCache ? 1 : 0;
            options.Text = Text ? 1 : 0;
            options.AddSpecialTokens = AddSpecialTokens ? 1 : 0;
            return options;
        }
    }
}
