//! Percentage prices that charge by event: a fixed amount, least and greatest fees,
//! free events and a free amount, in the order of time.
//!
//! As [Lago](https://docs.getlago.com/guide/plans/charges/charge-models/percentage)
//! has it: where both a number of events and an amount are free, an event is free as
//! far as both allow.

use super::decimal::{Decimal, DecimalError};
use super::decimal_sum::DecimalSum;
use super::timestamp::Timestamp;

/// A percentage price.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Percentage {
    pub rate_percent: Decimal,
    /// Charged for each event that is not free as a whole.
    pub fixed_amount_per_event: Decimal,
    pub free_events: Option<u64>,
    pub free_amount: Option<Decimal>,
    pub minimum_amount_per_event: Option<Decimal>,
    pub maximum_amount_per_event: Option<Decimal>,
}

impl Percentage {
    /// Whether the quantity and the number of events do not tell the price.
    pub fn needs_transactions(&self) -> bool {
        let is_free_by_amount = self.free_amount.is_some() && !self.fixed_amount_per_event.is_zero();
        self.is_clamped() || is_free_by_amount || self.free_events.is_some()
    }

    /// How many of the first events of an accumulation must be known one by one.
    fn listed(&self) -> usize {
        match (self.free_events, self.free_amount) {
            (Some(events), _) => usize::try_from(events).unwrap_or(usize::MAX),
            (None, Some(_)) => usize::MAX,
            (None, None) => 0,
        }
    }

    /// The cost of a quantity from so many events, where no transactions are needed.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn cost(&self, quantity: Decimal, events: u64) -> Result<Decimal, DecimalError> {
        let charged = self.beyond_free(quantity)?;
        self.rate_of(charged)?.checked_add(self.fixed_of(events)?)
    }

    /// Whether the fee of each event is held between bounds.
    pub fn is_clamped(&self) -> bool {
        self.minimum_amount_per_event.is_some() || self.maximum_amount_per_event.is_some()
    }

    /// What an event is charged that no allowance frees.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn whole_charge(&self, value: Decimal) -> Result<EventCharge, DecimalError> {
        Ok(EventCharge { charged: value, fee: self.fee(value)? })
    }

    /// Whether an event of this value can be charged at all, free or not.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where its fee overflows.
    pub fn check(&self, value: Decimal) -> Result<(), DecimalError> {
        self.fee(value).map(|_| ())
    }

    /// What of a running total the free amount does not hold.
    pub(super) fn beyond_free(&self, total: Decimal) -> Result<Decimal, DecimalError> {
        match self.free_amount {
            Some(free) if !total.is_negative() => Ok(total.checked_sub(free)?.max(Decimal::ZERO)),
            _ => Ok(total),
        }
    }

    pub(super) fn fixed_of(&self, events: u64) -> Result<Decimal, DecimalError> {
        self.fixed_amount_per_event.checked_mul(Decimal::from_u64(events))
    }

    pub(super) fn rate_of(&self, amount: Decimal) -> Result<Decimal, DecimalError> {
        amount.mul_div(self.rate_percent, Decimal::from_u64(100))
    }

    /// What one event costs, of which `charged` is not free.
    fn fee(&self, charged: Decimal) -> Result<Decimal, DecimalError> {
        let fee = self.rate_of(charged)?.checked_add(self.fixed_amount_per_event)?;
        let fee = self.minimum_amount_per_event.map_or(fee, |least| fee.max(least));
        Ok(self.maximum_amount_per_event.map_or(fee, |most| fee.min(most)))
    }
}

/// The fees of an accumulation to date. Its windows are added in the order of time, so
/// that no event is looked at twice.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fees {
    pub(super) charges: Charges,
    /// Number and value of all events, free or not.
    pub(super) events: u64,
    pub(super) value: DecimalSum,
}

impl Fees {
    /// Adds the events of a window that come after all that were added before. `each`
    /// hears of those that are known one by one, in the order of time.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn add(
        &mut self,
        window: &Transactions,
        price: &Percentage,
        each: &mut dyn FnMut(&Transaction, EventCharge),
    ) -> Result<(), DecimalError> {
        let mut first: Vec<_> = window.first.iter().collect();
        first.sort_unstable();
        for transaction in first {
            let has_allowance = price.free_events.is_none_or(|events| self.events < events);
            let before = if has_allowance { price.beyond_free(self.value.total()?)? } else { Decimal::ZERO };
            self.value.add(transaction.value);
            self.events += 1;
            let (is_free, charged) = match (has_allowance, price.free_amount) {
                (false, _) => (false, transaction.value),
                (true, None) => (true, Decimal::ZERO),
                (true, Some(free)) => {
                    let after = self.value.total()?;
                    (after <= free, price.beyond_free(after)?.checked_sub(before)?)
                }
            };
            let fee = if is_free { price.rate_of(charged)? } else { price.fee(charged)? };
            each(transaction, EventCharge { charged, fee });
            self.charges.value.add(charged);
            self.charges.fees.add(fee);
            self.charges.events += u64::from(!is_free);
        }
        // So many of them came before that the rest has no allowance.
        self.charges.merge(&window.rest);
        self.value.merge(window.rest.value);
        self.events += window.rest.events;
        Ok(())
    }

    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn cost(&self, price: &Percentage) -> Result<Decimal, DecimalError> {
        if price.is_clamped() {
            return self.charges.fees.total();
        }
        price.rate_of(self.charges.value.total()?)?.checked_add(price.fixed_of(self.charges.events)?)
    }
}

/// One event, in the order in which allowances are used up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transaction {
    pub timestamp: Timestamp,
    pub ingested_at: Timestamp,
    pub id: Box<str>,
    pub value: Decimal,
}

/// The events of a window, as far as a price must know them one by one: the
/// first ones as they are, the rest as sums. Whatever the order of adding and merging.
#[derive(Debug, Clone, Default)]
pub struct Transactions {
    first: std::collections::BinaryHeap<Transaction>,
    rest: Charges,
}

/// What one event is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventCharge {
    /// What of its value is not free.
    pub charged: Decimal,
    pub fee: Decimal,
}

/// Sums over events that are charged.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Charges {
    pub value: DecimalSum,
    /// Those that are not free as a whole.
    pub events: u64,
    pub fees: DecimalSum,
}

impl Charges {
    fn add(&mut self, charged: Decimal, price: &Percentage) -> Result<(), DecimalError> {
        let fee = price.fee(charged)?;
        self.value.add(charged);
        self.events += 1;
        self.fees.add(fee);
        Ok(())
    }

    fn merge(&mut self, other: &Charges) {
        self.value.merge(other.value);
        self.events += other.events;
        self.fees.merge(other.fees);
    }
}

impl Transactions {
    /// Adds an event that passed [`Percentage::check`].
    ///
    /// # Errors
    /// [`DecimalError::Overflow`] where the fee of an event overflows, this one or an earlier one.
    pub fn add(&mut self, transaction: Transaction, price: &Percentage) -> Result<(), DecimalError> {
        let listed = price.listed();
        if listed == 0 {
            return self.rest.add(transaction.value, price);
        }
        self.first.push(transaction);
        if self.first.len() > listed
            && let Some(later) = self.first.pop()
        {
            self.rest.add(later.value, price)?;
        }
        Ok(())
    }

    /// # Errors
    /// As [`Transactions::add`].
    pub fn merge(&mut self, other: &Transactions, price: &Percentage) -> Result<(), DecimalError> {
        self.rest.merge(&other.rest);
        other.first.iter().try_for_each(|transaction| self.add(transaction.clone(), price))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn d(text: &str) -> Decimal {
        text.parse().unwrap()
    }

    fn lago() -> Percentage {
        Percentage {
            rate_percent: d("1.2"),
            fixed_amount_per_event: d("0.10"),
            free_events: Some(3),
            free_amount: Some(d("500")),
            minimum_amount_per_event: None,
            maximum_amount_per_event: None,
        }
    }

    fn cost(price: &Percentage, values: &[i64]) -> String {
        let mut transactions = Transactions::default();
        for (at, value) in (0..).zip(values) {
            transactions.add(transaction(at, *value), price).unwrap();
        }
        cost_of(price, &[transactions])
    }

    /// Of windows in the order of time.
    fn cost_of(price: &Percentage, windows: &[Transactions]) -> String {
        let mut fees = Fees::default();
        windows.iter().for_each(|window| fees.add(window, price, &mut |_, _| ()).unwrap());
        fees.cost(price).unwrap().to_string()
    }

    fn transaction(at: i64, value: i64) -> Transaction {
        let timestamp = Timestamp::from_nanos(at);
        Transaction { timestamp, ingested_at: timestamp, id: "".into(), value: d(&value.to_string()) }
    }

    #[test]
    fn events_and_amounts_are_free_as_far_as_both_allow() {
        // The example of Lago's documentation.
        assert_eq!(cost(&lago(), &[200, 100, 100, 50]), "0.7");
        // The amount is used up first: 100 of the third event are charged.
        assert_eq!(cost(&lago(), &[200, 200, 200]), "1.3");
        assert_eq!(cost(&Percentage { free_events: None, ..lago() }, &[200, 200, 200, 10]), "1.52");
        // A credit takes back what was charged, down to the free amount.
        assert_eq!(cost(&Percentage { free_events: None, ..lago() }, &[450, 100, -80, 10]), "0.1");
        assert_eq!(cost(&Percentage { free_amount: None, ..lago() }, &[1000, 1000, 1000, 10]), "0.22");
        assert_eq!(cost(&Percentage { free_amount: None, free_events: None, ..lago() }, &[10, -10]), "0.2");
    }

    #[test]
    fn fees_are_held_between_bounds() {
        let price = Percentage {
            minimum_amount_per_event: Some(d("1")),
            maximum_amount_per_event: Some(d("3")),
            free_events: Some(1),
            free_amount: None,
            ..lago()
        };
        assert_eq!(cost(&price, &[5, 10, 1000]), "4");
    }

    proptest! {
        /// Promise 2: only the set of events matters.
        #[test]
        fn merging_in_any_order_gives_the_same(
            (values, shuffled) in proptest::collection::vec(-50i64..500, 1..30).prop_flat_map(|values| {
                let numbered: Vec<_> = (0i64..).zip(values).collect();
                (Just(numbered.clone()), Just(numbered).prop_shuffle())
            }),
            free_events in proptest::option::of(0u64..6),
            free_amount in proptest::option::of(0i64..600),
            minimum in proptest::option::of(0i64..3),
        ) {
            let price = Percentage {
                free_events,
                free_amount: free_amount.map(|amount| d(&amount.to_string())),
                minimum_amount_per_event: minimum.map(|amount| d(&amount.to_string())),
                ..lago()
            };
            let window = |values: &[(i64, i64)]| {
                let mut window = Transactions::default();
                values.iter().for_each(|(at, value)| window.add(transaction(*at, *value), &price).unwrap());
                window
            };
            let mut merged = Transactions::default();
            shuffled.chunks(4).for_each(|part| merged.merge(&window(part), &price).unwrap());
            let whole = cost_of(&price, &[window(&values)]);
            prop_assert_eq!(&whole, &cost_of(&price, &[merged]));
            let windows: Vec<_> = values.chunks(3).map(window).collect();
            prop_assert_eq!(whole, cost_of(&price, &windows));
        }
    }
}
