//! Numbers that look random and are the same each time, for any row on its own:
//! splitmix64, keyed by seed and row.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Mixes 64 bits. A bijection: different values stay different.
pub fn mix(value: u64) -> u64 {
    let mixed = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// A sequence of random numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of one row.
    pub fn new(seed: u64, number: u64) -> Self {
        Random(mix(mix(seed.wrapping_add(GOLDEN)) ^ number.wrapping_mul(GOLDEN)))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A whole number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        multiply(self.next(), bound).0
    }

    /// A whole number below `bound`. With `skew` 0 all are alike; each step more
    /// halves the median, so that few values are large, as in a log-normal distribution.
    pub fn skewed_below(&mut self, bound: u64, skew: u32) -> u64 {
        let fraction = self.next();
        let fraction = (0..skew).fold(fraction, |product, _| multiply(product, fraction).0);
        multiply(fraction, bound).0
    }
}

/// The product of 64 bits: its upper and its lower half.
fn multiply(a: u64, b: u64) -> (u64, u64) {
    let product = u128::from(a) * u128::from(b);
    let lower = u64::try_from(product & u128::from(u64::MAX)).unwrap_or_default();
    (u64::try_from(product >> 64).unwrap_or_default(), lower)
}

/// Draws indexes by weight in constant time (the alias method).
#[derive(Debug, Clone)]
pub struct Weighted {
    /// By cell: the share of it (in 2^-32) that is its own index, and the index of the rest.
    cells: Vec<(u32, u32)>,
}

impl Weighted {
    /// `None` where there is nothing to draw.
    pub fn new(weights: &[u64]) -> Option<Self> {
        let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
        if total == 0 {
            return None;
        }
        let count = weights.len() as u128;
        let mut cells = vec![(u32::MAX, 0); weights.len()];
        // Every cell has room for `total`; what is too light is filled up by what is too heavy.
        let (mut light, mut heavy) = (Vec::new(), Vec::new());
        for (index, weight) in (0u32..).zip(weights) {
            let mass = u128::from(*weight) * count;
            if mass < total { light.push((index, mass)) } else { heavy.push((index, mass)) }
        }
        while let (Some((index, mass)), Some((donor, rest))) = (light.pop(), heavy.pop()) {
            set(&mut cells, index, (u32::try_from((mass << 32) / total).unwrap_or(u32::MAX), donor));
            let rest = rest - (total - mass);
            if rest < total { light.push((donor, rest)) } else { heavy.push((donor, rest)) }
        }
        for (index, _) in light.into_iter().chain(heavy) {
            set(&mut cells, index, (u32::MAX, index));
        }
        Some(Weighted { cells })
    }

    /// Zipf's law: the weight of the index at rank r is 1 / r^exponent.
    #[allow(clippy::float_arithmetic, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn zipf(count: u32, exponent: f64) -> Option<Self> {
        // A float is fine for how often something is drawn. Rounded to whole weights,
        // the last bits, in which machines could differ, do not matter.
        let weight = |rank: u32| (1e12 / f64::from(rank).powf(exponent)).round().max(1.0) as u64;
        Self::new(&(1..=count).map(weight).collect::<Vec<_>>())
    }

    pub fn draw(&self, random: &mut Random) -> usize {
        let (cell, fraction) = multiply(random.next(), self.cells.len() as u64);
        let index = usize::try_from(cell).unwrap_or_default();
        match self.cells.get(index) {
            Some((own, other)) if fraction >> 32 > u64::from(*own) => usize::try_from(*other).unwrap_or_default(),
            _ => index,
        }
    }
}

fn set(cells: &mut [(u32, u32)], index: u32, cell: (u32, u32)) {
    if let Some(slot) = usize::try_from(index).ok().and_then(|index| cells.get_mut(index)) {
        *slot = cell;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_drawn_by_weight() {
        let weights = [1, 0, 5, 2, 2];
        let weighted = Weighted::new(&weights).unwrap();
        let mut drawn = [0u64; 5];
        for number in 0..100_000 {
            drawn[weighted.draw(&mut Random::new(1, number))] += 1;
        }
        for (drawn, weight) in drawn.iter().zip(weights) {
            assert!(drawn.abs_diff(weight * 10_000) < 500, "{drawn} of weight {weight}");
        }
        assert!(Weighted::new(&[0, 0]).is_none() && Weighted::new(&[]).is_none());
    }

    #[test]
    fn skew_halves_the_median_and_keeps_the_bounds() {
        for (skew, median) in [(0, 500), (1, 250), (3, 62)] {
            let mut values: Vec<_> = (0..10_001).map(|number| Random::new(7, number).skewed_below(1000, skew)).collect();
            values.sort_unstable();
            assert!(values[5000].abs_diff(median) < 20, "{} for skew {skew}", values[5000]);
            assert!(values[10_000] < 1000 && values[10_000] > 950);
        }
    }
}
