//! Look-ups by text that a batch repeats.

/// What texts stand for, by where they lie in memory: the values of a dictionary column
/// lie where they lay for the row before, and need not be hashed and compared again. It
/// holds for one batch, while nothing else can take the place of its texts.
#[derive(Debug)]
pub struct TextMemo<const N: usize, V> {
    batch: u64,
    slots: Vec<Option<Slot<N, V>>>,
}

#[derive(Debug, Clone, Copy)]
struct Slot<const N: usize, V> {
    batch: u64,
    texts: [(usize, usize); N],
    value: V,
}

impl<const N: usize, V: Copy> TextMemo<N, V> {
    /// With room for 2^`bits` answers.
    pub fn new(bits: u32) -> Self {
        TextMemo { batch: 0, slots: vec![None; 1 << bits] }
    }

    /// Forgets everything: from here on other texts may lie in the same places.
    pub fn begin_batch(&mut self) {
        self.batch += 1;
    }

    pub fn get(&mut self, texts: [&str; N], find: impl FnOnce() -> V) -> V {
        let texts = texts.map(|text| (text.as_ptr().addr(), text.len()));
        let mixed = texts.iter().fold(0usize, |mixed, (place, _)| (mixed ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15_usize));
        let at = (mixed >> 32) & (self.slots.len() - 1);
        let Some(slot) = self.slots.get_mut(at) else { return find() };
        match slot {
            Some(known) if known.batch == self.batch && known.texts == texts => known.value,
            _ => {
                let value = find();
                *slot = Some(Slot { batch: self.batch, texts, value });
                value
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_in_the_same_place_are_looked_up_once_a_batch() {
        let text = String::from("acme");
        let mut memo: TextMemo<1, usize> = TextMemo::new(4);
        let mut found = 0;
        let mut look_up = |memo: &mut TextMemo<1, usize>, text: &str| {
            memo.get([text], || {
                found += 1;
                text.len()
            })
        };
        assert_eq!(look_up(&mut memo, &text), 4);
        assert_eq!(look_up(&mut memo, &text), 4);
        assert_eq!(look_up(&mut memo, text.trim_end_matches('e')), 3);
        memo.begin_batch();
        assert_eq!(look_up(&mut memo, &text), 4);
        assert_eq!(found, 3);
    }
}
