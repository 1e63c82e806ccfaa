using System;

namespace MirrorSd
{
    /// <summary>Whose fault a failure is.</summary>
    public enum ErrorCode
    {
        /// <summary>A bundle is missing, incomplete, edited, or of another schema version.</summary>
        Bundle = 1,

        /// <summary>A device isn't there, can't take a segment, or failed.</summary>
        Device = 2,

        /// <summary>A prompt doesn't fit the KV cache.</summary>
        Capacity = 3,

        /// <summary>A request contradicts itself, the bundle or the engine.</summary>
        Request = 4,

        /// <summary>The engine is already making an answer.</summary>
        Busy = 5,

        /// <summary>Out of memory, or a fault of the library.</summary>
        Internal = 6,
    }

    /// <summary>What the native library refused or failed at, in its own words: what was found, what was expected,
    /// and what to do.</summary>
    public sealed class MirrorException : Exception
    {
        internal MirrorException(ErrorCode code, string message) : base(message)
        {
            Code = code;
        }

        /// <summary>Whose fault it is.</summary>
        public ErrorCode Code { get; }
    }
}
