using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Text;

namespace MirrorSd
{
    /// <summary>Between managed values and mirror.h's: statuses, UTF-8, arrays.</summary>
    internal static class Interop
    {
        /// <summary>Frees a status; throws it if it is one.</summary>
        internal static void Check(IntPtr status)
        {
            if (status == IntPtr.Zero)
            {
                return;
            }
            var error = new MirrorException(
                (ErrorCode)Native.mirror_status_code(status), TextAt(Native.mirror_status_message(status)));
            Native.mirror_status_free(status);
            throw error;
        }

        /// <summary>A text as zero-terminated UTF-8; null stays null.</summary>
        internal static byte[] Utf8(string text)
        {
            if (text == null)
            {
                return null;
            }
            // A lone surrogate is refused, not replaced: the text that the caller meant is not known.
            var encoding = new UTF8Encoding(false, true);
            var bytes = new byte[encoding.GetByteCount(text) + 1];
            encoding.GetBytes(text, 0, text.Length, bytes, 0);
            return bytes;
        }

        /// <summary>Zero-terminated UTF-8 as a text.</summary>
        internal static string TextAt(IntPtr start)
        {
            var length = 0;
            while (Marshal.ReadByte(start, length) != 0)
            {
                ++length;
            }
            return TextAt(start, length);
        }

        internal static string TextAt(IntPtr start, int length)
        {
            var bytes = new byte[length];
            if (length > 0)
            {
                Marshal.Copy(start, bytes, 0, length);
            }
            return Encoding.UTF8.GetString(bytes);
        }

        internal static long[] TokensAt(IntPtr start, UIntPtr count)
        {
            var tokens = new long[(int)count];
            if (tokens.Length > 0)
            {
                Marshal.Copy(start, tokens, 0, tokens.Length);
            }
            return tokens;
        }
    }

    /// <summary>Native copies of what options point to, as long as a call lasts.</summary>
    internal sealed class NativeMemory : IDisposable
    {
        private readonly List<IntPtr> _blocks = new List<IntPtr>();

        internal IntPtr Text(string text)
        {
            var bytes = Interop.Utf8(text);
            if (bytes == null)
            {
                return IntPtr.Zero;
            }
            var block = Block(bytes.Length);
            Marshal.Copy(bytes, 0, block, bytes.Length);
            return block;
        }

        internal IntPtr Numbers(IReadOnlyList<int> numbers)
        {
            if (numbers == null || numbers.Count == 0)
            {
                return IntPtr.Zero;
            }
            var block = Block(numbers.Count * sizeof(int));
            for (var index = 0; index < numbers.Count; ++index)
            {
                Marshal.WriteInt32(block, index * sizeof(int), numbers[index]);
            }
            return block;
        }

        internal IntPtr Texts(IReadOnlyList<string> texts)
        {
            if (texts == null || texts.Count == 0)
            {
                return IntPtr.Zero;
            }
            var block = Block(texts.Count * IntPtr.Size);
            for (var index = 0; index < texts.Count; ++index)
            {
                Marshal.WriteIntPtr(block, index * IntPtr.Size, Text(texts[index]));
            }
            return block;
        }

        public void Dispose()
        {
            foreach (var block in _blocks)
            {
                Marshal.FreeHGlobal(block);
            }
            _blocks.Clear();
        }

        private IntPtr Block(int bytes)
        {
            var block = Marshal.AllocHGlobal(bytes);
            _blocks.Add(block);
            return block;
        }
    }
}
