//! A scanner for the JSON that events carry, several times faster than a general
//! reader because it builds nothing: it checks the grammar of the whole text and
//! notes where the wanted values lie.
//!
//! It may give up (`None`) on any text, sound or not; where it does not, it has
//! accepted exactly what serde_json accepts. A property test compares the two.

use super::property::Property;

/// A step of the wanted paths.
#[derive(Debug, Clone, Default)]
pub(super) struct Node {
    pub children: Vec<(String, Node)>,
    /// The slot whose path ends here.
    pub slot: Option<usize>,
    /// Tells it from the other nodes that have children. Beyond 64 of them, some share theirs.
    pub bit: u64,
}

impl Node {
    /// The wanted property of this name.
    pub fn child(&self, key: &str) -> Option<&Node> {
        self.children.iter().find(|(name, _)| name == key).map(|(_, node)| node)
    }

    /// Empties the slots of all that lies below: of a key that repeats, an earlier
    /// object must leave nothing behind.
    pub fn clear_below(&self, slots: &mut [Property<'_>]) {
        for (_, child) in &self.children {
            if let Some(slot) = child.slot.and_then(|slot| slots.get_mut(slot)) {
                *slot = Property::Absent;
            }
            child.clear_below(slots);
        }
    }
}

pub(super) struct Scanner<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    /// The bits of the nodes whose key was read.
    seen: u64,
}

/// Deeper texts are left to serde_json: one bit a level says what is open.
const MOST_LEVELS: u32 = 64;

impl<'a> Scanner<'a> {
    pub fn new(text: &'a str) -> Self {
        Scanner { text, bytes: text.as_bytes(), at: 0, seen: 0 }
    }

    /// Fills the slots of the object that is the whole text.
    pub fn properties(mut self, root: &Node, slots: &mut [Property<'a>]) -> Option<()> {
        self.space();
        self.object(root, slots)?;
        self.space();
        (self.at == self.bytes.len()).then_some(())
    }

    /// Recursion is as deep as the wanted paths, no deeper.
    fn object(&mut self, node: &Node, slots: &mut [Property<'a>]) -> Option<()> {
        self.take(b'{')?;
        self.space();
        if self.take(b'}').is_some() {
            return Some(());
        }
        loop {
            let key = self.key()?;
            self.space();
            let start = self.at;
            let child = node.child(key);
            match child {
                Some(child) if !child.children.is_empty() => {
                    // A repeated key, whose earlier object is to be forgotten, is left to serde_json.
                    if self.seen & child.bit != 0 {
                        return None;
                    }
                    self.seen |= child.bit;
                    if self.peek() == Some(b'{') { self.object(child, slots)? } else { self.value()? }
                }
                _ => self.value()?,
            }
            if let Some(slot) = child.and_then(|child| child.slot) {
                *slots.get_mut(slot)? = Property::from_raw(self.text.get(start..self.at)?);
            }
            self.space();
            match self.next()? {
                b',' => self.space(),
                b'}' => return Some(()),
                _ => return None,
            }
        }
    }

    /// A key and its colon. Escapes in keys are rare: they are left to serde_json.
    fn key(&mut self) -> Option<&'a str> {
        self.take(b'"')?;
        let start = self.at;
        self.plain_text();
        let key = self.text.get(start..self.at)?;
        self.take(b'"')?;
        self.space();
        self.take(b':')?;
        Some(key)
    }

    /// Passes over a value of any kind.
    fn value(&mut self) -> Option<()> {
        match self.peek()? {
            b'"' => self.string(),
            b'{' | b'[' => self.composite(),
            _ => self.scalar(),
        }
    }

    /// A number, `true`, `false` or `null`.
    fn scalar(&mut self) -> Option<()> {
        match self.peek()? {
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => self.number(),
        }
    }

    /// An object or array with everything in it.
    fn composite(&mut self) -> Option<()> {
        // One bit a level: 1 is an object.
        let (mut open, mut levels) = (0u64, 0u32);
        loop {
            // A value begins here.
            let byte = self.peek()?;
            if byte == b'{' || byte == b'[' {
                self.at += 1;
                (open, levels) = (open << 1 | u64::from(byte == b'{'), levels + 1);
                if levels > MOST_LEVELS {
                    return None;
                }
                self.space();
                let end = if byte == b'{' { b'}' } else { b']' };
                if self.peek()? != end {
                    if byte == b'{' {
                        self.any_key()?;
                    }
                    continue;
                }
            } else if byte == b'"' {
                self.string()?;
            } else {
                self.scalar()?;
            }
            // A value, or nothing, ended here.
            loop {
                self.space();
                let is_object = open & 1 == 1;
                match self.next()? {
                    b',' => {
                        self.space();
                        if is_object {
                            self.any_key()?;
                        }
                        break;
                    }
                    b'}' if is_object => {}
                    b']' if !is_object => {}
                    _ => return None,
                }
                (open, levels) = (open >> 1, levels - 1);
                if levels == 0 {
                    return Some(());
                }
            }
        }
    }

    /// A key that nobody asks for, its colon, and the space behind it.
    fn any_key(&mut self) -> Option<()> {
        self.string()?;
        self.space();
        self.take(b':')?;
        self.space();
        Some(())
    }

    fn string(&mut self) -> Option<()> {
        self.take(b'"')?;
        loop {
            self.plain_text();
            match self.next()? {
                b'"' => return Some(()),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    b'u' => {
                        let digits = self.bytes.get(self.at..self.at + 4)?;
                        self.at += 4;
                        digits.iter().all(u8::is_ascii_hexdigit).then_some(())?;
                    }
                    _ => return None,
                },
                // A control character.
                _ => return None,
            }
        }
    }

    /// Up to the next quote, backslash or control character, eight bytes at a time.
    fn plain_text(&mut self) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGHS: u64 = ONES << 7;
        // Marks bytes below `bound` by their high bit; right up to the first marked one.
        let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound) & !word;
        while let Some(chunk) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk::<8>) {
            let word = u64::from_le_bytes(*chunk);
            let quotes = below(word ^ (ONES * u64::from(b'"')), 1);
            let escapes = below(word ^ (ONES * u64::from(b'\\')), 1);
            let marks = (quotes | escapes | below(word, 0x20)) & HIGHS;
            if marks != 0 {
                self.at += (marks.trailing_zeros() / 8) as usize;
                return;
            }
            self.at += 8;
        }
        while self.peek().is_some_and(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\') {
            self.at += 1;
        }
    }

    fn number(&mut self) -> Option<()> {
        if self.peek()? == b'-' {
            self.at += 1;
        }
        if self.take(b'0').is_none() {
            self.digits()?;
        }
        if self.take(b'.').is_some() {
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Some(())
    }

    /// At least one digit.
    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.bytes.get(self.at..)?.starts_with(word).then(|| self.at += word.len())
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    /// Passes over `byte` if it is next.
    fn take(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }
}
