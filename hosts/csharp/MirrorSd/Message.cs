using System;
using System.Collections.Generic;
using System.Linq;

namespace MirrorSd
{
    /// <summary>One message of a conversation.</summary>
    public sealed class Message
    {
        /// <summary>Makes a message.</summary>
        /// <param name="role">system, user or assistant.</param>
        /// <param name="content">What was said.</param>
        public Message(string role, string content)
        {
            Role = role ?? throw new ArgumentNullException(nameof(role));
            Content = content ?? throw new ArgumentNullException(nameof(content));
        }

        /// <summary>system, user or assistant.</summary>
        public string Role { get; }

        /// <summary>What was said.</summary>
        public string Content { get; }

        internal static Native.Message[] ToNative(IEnumerable<Message> messages, NativeMemory memory) =>
            messages.Select(message => new Native.Message
            {
                Role = memory.Text(message.Role),
                Content = memory.Text(message.Content),
                ContentLength = (UIntPtr)(Interop.Utf8(message.Content).Length - 1),
            }).ToArray();
    }
}
