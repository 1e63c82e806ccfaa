using System;
using System.Collections;
using System.Collections.Generic;
using System.Runtime.InteropServices;

namespace MirrorSd
{
    /// <summary>What one round committed.</summary>
    public sealed class Piece
    {
        internal Piece(Native.Piece found)
        {
            Tokens = Interop.TokensAt(found.Tokens, found.TokenCount);
            Text = Interop.TextAt(found.Text, (int)found.TextLength);
        }

        /// <summary>The tokens.</summary>
        public long[] Tokens { get; }

        /// <summary>The text that they settle, never half a character; may be empty.</summary>
        public string Text { get; }
    }

    /// <summary>One answer: iterate for its pieces, once. Disposing it ends it and frees the engine for the next
    /// one. Not safe to use from two threads at a time; <see cref="Engine.Cancel"/> is.</summary>
    public sealed class Answer : IEnumerable<Piece>, IDisposable
    {
        private readonly Native.AnswerHandle _handle;

        internal Answer(Native.AnswerHandle handle)
        {
            _handle = handle;
        }

        /// <summary>The tokens so far.</summary>
        public long[] Tokens => Interop.TokensAt(Native.mirror_answer_tokens(_handle, out var count), count);

        /// <summary>The text so far; null for an answer without text.</summary>
        public string Text
        {
            get
            {
                var text = Native.mirror_answer_text(_handle, out var length);
                return text == IntPtr.Zero ? null : Interop.TextAt(text, (int)length);
            }
        }

        /// <summary>Why it ended.</summary>
        public FinishReason FinishReason => Native.mirror_answer_finish_reason(_handle);

        /// <summary>Counts and times so far.</summary>
        public Statistics Statistics => new Statistics(_handle);

        /// <summary>The rounds so far.</summary>
        public IReadOnlyList<Round> Rounds
        {
            get
            {
                var rounds = new List<Round>();
                for (ulong index = 0; index < (ulong)Native.mirror_answer_round_count(_handle); ++index)
                {
                    var found = new Native.Round { StructSize = (uint)Marshal.SizeOf<Native.Round>() };
                    Interop.Check(Native.mirror_answer_round(_handle, (UIntPtr)index, ref found));
                    rounds.Add(new Round(found));
                }
                return rounds;
            }
        }

        /// <summary>What the user should hear of, such as a draft that was lost; the text is unharmed by it.</summary>
        public IReadOnlyList<string> Events
        {
            get
            {
                var events = new List<string>();
                for (ulong index = 0; index < (ulong)Native.mirror_answer_event_count(_handle); ++index)
                {
                    events.Add(Interop.TextAt(Native.mirror_answer_event(_handle, (UIntPtr)index)));
                }
                return events;
            }
        }

        /// <summary>Runs one round.</summary>
        /// <returns>What it committed; null when the answer is complete.</returns>
        /// <exception cref="MirrorException">The target failed; the answer has ended.</exception>
        public Piece Next()
        {
            Interop.Check(Native.mirror_answer_next(_handle, out var piece, out var more));
            return more == 0 ? null : new Piece(piece);
        }

        /// <summary>Runs to the end.</summary>
        /// <returns>This answer.</returns>
        public Answer Run()
        {
            while (Next() != null)
            {
            }
            return this;
        }

        /// <inheritdoc/>
        public IEnumerator<Piece> GetEnumerator()
        {
            for (var piece = Next(); piece != null; piece = Next())
            {
                yield return piece;
            }
        }

        IEnumerator IEnumerable.GetEnumerator() => GetEnumerator();

        /// <summary>Ends the answer.</summary>
        public void Dispose() => _handle.Dispose();
    }
}
