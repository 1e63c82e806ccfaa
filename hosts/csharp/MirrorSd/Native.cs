using System;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace MirrorSd
{
    /// <summary>mirror.h as it is: layouts and entry points, nothing else.</summary>
    internal static class Native
    {
        private const string Library = "mirror";

        [StructLayout(LayoutKind.Sequential)]
        internal struct LoadOptions
        {
            public uint StructSize;
            public Mode Mode;
            public Candidates Candidates;
            public int Threads;
            public int MaxLength;
            public int Gamma;
            public int Kappa;
            public IntPtr Fanout;
            public UIntPtr FanoutCount;
            public IntPtr TokensPerPass;
            public UIntPtr TokensPerPassCount;
            public IntPtr TargetDevice;
            public IntPtr SuffixDevice;
            public IntPtr DraftDevice;
            public int Pinned;
            public int VerifyHashes;
            public double DraftTimeoutS;
            public int MaxNgramSize;
            public IntPtr BranchesPerPass;
            public UIntPtr BranchesPerPassCount;
            public IntPtr ProposalTokensPerPass;
            public UIntPtr ProposalTokensPerPassCount;
            public int DraftContext;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct GenerateOptions
        {
            public uint StructSize;
            public Mode Mode;
            public long MaxNewTokens;
            public double Temperature;
            public long TopK;
            public double TopP;
            public double MinP;
            public double RepetitionPenalty;
            public ulong Seed;
            public IntPtr Stop;
            public UIntPtr StopCount;
            public int NumAssistantTokens;
            public int ReuseCache;
            public int Text;
            public int AddSpecialTokens;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Message
        {
            public IntPtr Role;
            public IntPtr Content;
            public UIntPtr ContentLength;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Piece
        {
            public IntPtr Tokens;
            public UIntPtr TokenCount;
            public IntPtr Text;
            public UIntPtr TextLength;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Facts
        {
            public uint StructSize;
            public Mode Mode;
            public int VocabSize;
            public int Gamma;
            public int MaxLength;
            public int Branches;
            public int TargetThreads;
            public int DraftThreads;
            public int RecordedPasses;
            public IntPtr DraftKernels;
            public IntPtr Notices;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Statistics
        {
            public uint StructSize;
            public int PromptTokens;
            public int ReusedPromptTokens;
            public int GeneratedTokens;
            public int Rounds;
            public int DraftTokensProposed;
            public int DraftTokensAccepted;
            public int TargetForwardPasses;
            public int Redrafts;
            public double AcceptanceRate;
            public double TokensPerRound;
            public double ReuseRate;
            public double BranchesPerRound;
            public double TtftS;
            public double DecodeTokensPerS;
            public double DraftHidden;
            public double RoundMs;
            public double PrefixMs;
            public double ExitHeadMs;
            public double SuffixMs;
            public double TrunkMs;
            public double RolloutMs;
            public double ProposeMs;
            public double CandidateWaitMs;
            public double RolloutWaitMs;
            public double RedraftMs;
            public double HostMs;
        }

        [StructLayout(LayoutKind.Sequential)]
        internal struct Round
        {
            public uint StructSize;
            public Mode Mode;
            public int Proposed;
            public int Accepted;
            public int Committed;
            public int Branches;
            public int WantedBranch;
            public int Reused;
            public double DurationMs;
        }

        internal sealed class EngineHandle : SafeHandleZeroOrMinusOneIsInvalid
        {
            private EngineHandle() : base(true)
            {
            }

            protected override bool ReleaseHandle()
            {
                mirror_engine_free(handle);
                return true;
            }
        }

        internal sealed class AnswerHandle : SafeHandleZeroOrMinusOneIsInvalid
        {
            private AnswerHandle() : base(true)
            {
            }

            protected override bool ReleaseHandle()
            {
                mirror_answer_free(handle);
                return true;
            }
        }

        [DllImport(Library)]
        internal static extern uint mirror_api_version();

        [DllImport(Library)]
        internal static extern int mirror_status_code(IntPtr status);

        [DllImport(Library)]
        internal static extern IntPtr mirror_status_message(IntPtr status);

        [DllImport(Library)]
        internal static extern void mirror_status_free(IntPtr status);

        [DllImport(Library)]
        internal static extern IntPtr mirror_register_provider_library(byte[] name, byte[] path);

        [DllImport(Library)]
        internal static extern void mirror_load_options_init_sized(out LoadOptions options, UIntPtr size);

        [DllImport(Library)]
        internal static extern IntPtr mirror_engine_load(byte[] folder, ref LoadOptions options, out EngineHandle engine);

        [DllImport(Library)]
        private static extern void mirror_engine_free(IntPtr engine);

        [DllImport(Library)]
        internal static extern void mirror_engine_cancel(EngineHandle engine);

        [DllImport(Library)]
        internal static extern IntPtr mirror_engine_describe(EngineHandle engine, ref Facts facts);

        [DllImport(Library)]
        internal static extern IntPtr mirror_bundle_check(byte[] folder, int verifyHashes);

        [DllImport(Library)]
        internal static extern IntPtr mirror_engine_encode(
            EngineHandle engine, byte[] text, UIntPtr length, int addSpecialTokens, out IntPtr tokens, out UIntPtr count);

        [DllImport(Library)]
        internal static extern void mirror_tokens_free(IntPtr tokens);

        [DllImport(Library)]
        internal static extern IntPtr mirror_engine_decode(
            EngineHandle engine, long[] tokens, UIntPtr count, out IntPtr text, out UIntPtr length);

        [DllImport(Library)]
        internal static extern void mirror_text_free(IntPtr text);

        [DllImport(Library)]
        internal static extern void mirror_generate_options_init(out GenerateOptions options);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_start_tokens(
            EngineHandle engine, long[] tokens, UIntPtr count, ref GenerateOptions options, out AnswerHandle answer);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_start_text(
            EngineHandle engine, byte[] text, UIntPtr length, ref GenerateOptions options, out AnswerHandle answer);

        [DllImport(Library)]
        internal static extern IntPtr mirror_engine_render_chat(
            EngineHandle engine, [In] Message[] messages, UIntPtr count, out IntPtr text, out UIntPtr length);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_start_chat(
            EngineHandle engine, [In] Message[] messages, UIntPtr count, ref GenerateOptions options,
            out AnswerHandle answer);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_next(AnswerHandle answer, out Piece piece, out int more);

        [DllImport(Library)]
        private static extern void mirror_answer_free(IntPtr answer);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_tokens(AnswerHandle answer, out UIntPtr count);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_text(AnswerHandle answer, out UIntPtr length);

        [DllImport(Library)]
        internal static extern FinishReason mirror_answer_finish_reason(AnswerHandle answer);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_statistics(AnswerHandle answer, ref Statistics statistics);

        [DllImport(Library)]
        internal static extern UIntPtr mirror_answer_round_count(AnswerHandle answer);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_round(AnswerHandle answer, UIntPtr index, ref Round round);

        [DllImport(Library)]
        internal static extern UIntPtr mirror_answer_event_count(AnswerHandle answer);

        [DllImport(Library)]
        internal static extern IntPtr mirror_answer_event(AnswerHandle answer, UIntPtr index);

        [DllImport(Library)]
        internal static extern double mirror_uniform(ulong seed, ulong position, uint token);

        [DllImport(Library)]
        internal static extern IntPtr mirror_choose_token(
            float[] logits, UIntPtr vocabSize, long[] context, UIntPtr contextCount, ref GenerateOptions options,
            ulong position, out long token);
    }
}
