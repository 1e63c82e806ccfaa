using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using System.Threading;

namespace MirrorSd
{
    /// <summary>A loaded bundle. Makes one answer at a time.</summary>
    public sealed class Engine : IDisposable
    {
        private readonly Native.EngineHandle _handle;

        private Engine(Native.EngineHandle handle)
        {
            _handle = handle;
        }

        /// <summary>Loads the bundle in a folder.</summary>
        /// <param name="folder">A folder that `mirror export` wrote.</param>
        /// <param name="options">Null takes the bundle's settings and the defaults.</param>
        /// <exception cref="MirrorException">The bundle, a device, or an option is not as it should be.</exception>
        public static Engine Load(string folder, LoadOptions options = null)
        {
            using (var memory = new NativeMemory())
            {
                var given = (options ?? new LoadOptions()).ToNative(memory);
                Interop.Check(Native.mirror_engine_load(Interop.Utf8(folder), ref given, out var handle));
                return new Engine(handle);
            }
        }

        /// <summary>Makes a plugin's execution providers known to ONNX Runtime, once per process and name: needed
        /// before a bundle is loaded on openvino devices.</summary>
        public static void RegisterProviderLibrary(string name, string path) =>
            Interop.Check(Native.mirror_register_provider_library(Interop.Utf8(name), Interop.Utf8(path)));

        /// <summary>Checks a bundle without loading it: the manifest, and every file's size, or its hash too.</summary>
        public static void CheckBundle(string folder, bool verifyHashes = false) =>
            Interop.Check(Native.mirror_bundle_check(Interop.Utf8(folder), verifyHashes ? 1 : 0));

        /// <summary>The mode that it was loaded in.</summary>
        public Mode Mode => Describe().Mode;

        /// <summary>Tokens that the model knows.</summary>
        public int VocabSize => Describe().VocabSize;

        /// <summary>Tokens that a context may have.</summary>
        public int MaxLength => Describe().MaxLength;

        /// <summary>Passes that its GPUs have recorded and replay, so far.</summary>
        public int RecordedPasses => Describe().RecordedPasses;

        /// <summary>What the library's own kernels run the draft with: amx, avx512 or avx2; null where ONNX Runtime runs
        /// it, or none is loaded.</summary>
        public string DraftKernels => Marshal.PtrToStringAnsi(Describe().DraftKernels);

        /// <summary>What its devices do without though it was asked for or is usual, such as the library's own kernels on
        /// a GPU, a sentence each.</summary>
        public string[] Notices
        {
            get
            {
                var lines = Describe().Notices;
                return lines == IntPtr.Zero ? new string[0] : Interop.TextAt(lines).Split('\n');
            }
        }

        /// <summary>Begins an answer to a text. The engine is busy until it has ended or is disposed.</summary>
        /// <exception cref="MirrorException">The request contradicts the bundle, doesn't fit the cache, or another
        /// answer is being made.</exception>
        public Answer Start(string prompt, GenerateOptions options = null)
        {
            using (var memory = new NativeMemory())
            {
                var given = (options ?? new GenerateOptions()).ToNative(memory);
                var text = Interop.Utf8(prompt);
                var length = (UIntPtr)(text.Length - 1);
                Interop.Check(Native.mirror_answer_start_text(_handle, text, length, ref given, out var answer));
                return new Answer(answer);
            }
        }

        /// <summary>Begins to continue token ids; see the other overload.</summary>
        public Answer Start(IEnumerable<long> prompt, GenerateOptions options = null)
        {
            using (var memory = new NativeMemory())
            {
                var given = (options ?? new GenerateOptions()).ToNative(memory);
                var tokens = prompt.ToArray();
                var count = (UIntPtr)tokens.Length;
                Interop.Check(Native.mirror_answer_start_tokens(_handle, tokens, count, ref given, out var answer));
                return new Answer(answer);
            }
        }

        /// <summary>Begins an answer to a conversation, in the model's chat format; see <see cref="RenderChat"/>.</summary>
        public Answer Start(IEnumerable<Message> messages, GenerateOptions options = null)
        {
            using (var memory = new NativeMemory())
            {
                var given = (options ?? new GenerateOptions()).ToNative(memory);
                var listed = Message.ToNative(messages, memory);
                var count = (UIntPtr)listed.Length;
                Interop.Check(Native.mirror_answer_start_chat(_handle, listed, count, ref given, out var answer));
                return new Answer(answer);
            }
        }

        /// <summary>Answers a text piece by piece. Leaving the loop early ends the answer.</summary>
        /// <param name="prompt">The whole prompt.</param>
        /// <param name="options">Choices for this answer.</param>
        /// <param name="cancellation">Ends the answer after the round under way.</param>
        /// <exception cref="OperationCanceledException">It was cancelled; what was committed has been given.</exception>
        public IEnumerable<string> Stream(
            string prompt, GenerateOptions options = null, CancellationToken cancellation = default) =>
            Pieces(() => Start(prompt, options), cancellation);

        /// <summary>Answers a conversation piece by piece; see the other overload.</summary>
        public IEnumerable<string> Stream(
            IEnumerable<Message> messages, GenerateOptions options = null, CancellationToken cancellation = default) =>
            Pieces(() => Start(messages, options), cancellation);

        /// <summary>Answers a text.</summary>
        public string Generate(string prompt, GenerateOptions options = null)
        {
            using (var answer = Start(prompt, options))
            {
                return answer.Run().Text;
            }
        }

        /// <summary>Answers a conversation.</summary>
        public string Generate(IEnumerable<Message> messages, GenerateOptions options = null)
        {
            using (var answer = Start(messages, options))
            {
                return answer.Run().Text;
            }
        }

        /// <summary>A conversation in the model's chat format, special tokens included, ending where the assistant's
        /// answer begins: an optional system message, then user and assistant in turn, the user last.</summary>
        /// <exception cref="MirrorException">The bundle has no such format, or it doesn't cover the messages.</exception>
        public string RenderChat(IEnumerable<Message> messages)
        {
            using (var memory = new NativeMemory())
            {
                var listed = Message.ToNative(messages, memory);
                Interop.Check(Native.mirror_engine_render_chat(
                    _handle, listed, (UIntPtr)listed.Length, out var text, out var length));
                try
                {
                    return Interop.TextAt(text, (int)length);
                }
                finally
                {
                    Native.mirror_text_free(text);
                }
            }
        }

        /// <summary>Stops the answer being made after its round, from any thread; does nothing when there is none.</summary>
        public void Cancel() => Native.mirror_engine_cancel(_handle);

        /// <summary>Token ids of a text.</summary>
        /// <param name="text">Any text.</param>
        /// <param name="addSpecialTokens">Whether the tokenizer's special tokens are put around it.</param>
        public long[] Encode(string text, bool addSpecialTokens = true)
        {
            var bytes = Interop.Utf8(text);
            Interop.Check(Native.mirror_engine_encode(
                _handle, bytes, (UIntPtr)(bytes.Length - 1), addSpecialTokens ? 1 : 0, out var tokens, out var count));
            try
            {
                return Interop.TokensAt(tokens, count);
            }
            finally
            {
                Native.mirror_tokens_free(tokens);
            }
        }

        /// <summary>The text of token ids, special tokens left out.</summary>
        public string Decode(IEnumerable<long> tokens)
        {
            var all = tokens.ToArray();
            Interop.Check(Native.mirror_engine_decode(_handle, all, (UIntPtr)all.Length, out var text, out var length));
            try
            {
                return Interop.TextAt(text, (int)length);
            }
            finally
            {
                Native.mirror_text_free(text);
            }
        }

        /// <summary>Lets the bundle go. An answer that is still being made ends as cancelled.</summary>
        public void Dispose() => _handle.Dispose();

        private IEnumerable<string> Pieces(Func<Answer> start, CancellationToken cancellation)
        {
            using (var answer = start())
            using (cancellation.Register(Cancel))
            {
                // A token that was cancelled before the answer began has done its call already.
                cancellation.ThrowIfCancellationRequested();
                foreach (var piece in answer)
                {
                    if (piece.Text.Length > 0)
                    {
                        yield return piece.Text;
                    }
                }
                cancellation.ThrowIfCancellationRequested();
            }
        }

        private Native.Facts Describe()
        {
            var facts = new Native.Facts { StructSize = (uint)Marshal.SizeOf<Native.Facts>() };
            Interop.Check(Native.mirror_engine_describe(_handle, ref facts));
            return facts;
        }
    }
}
