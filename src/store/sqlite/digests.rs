//! Digests of definitions repeat in every row of `usage_windows`: rows have their numbers
//! in a table of their own.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::Result;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, Row, Statement, Transaction};
use rustc_hash::FxHashMap;

use crate::model::aggregate::{Basis, Text};
use crate::store::reader::WindowReader;
use crate::store::rows::Cells;

const ALL: &str = "SELECT id, digest FROM definition_digests";

/// Digests by number.
pub(super) struct Digests(FxHashMap<i64, String>);

impl Digests {
    pub fn load(connection: &Connection) -> Result<Digests> {
        let mut statement = connection.prepare(ALL)?;
        let digests = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(Digests(digests.collect::<rusqlite::Result<_>>()?))
    }

    /// A number that is of none was altered; `verify` names its row.
    pub fn text(&self, number: i64) -> Cow<'_, str> {
        self.0.get(&number).map_or_else(|| Cow::Owned(format!("no digest {number}")), |digest| Cow::Borrowed(digest.as_str()))
    }
}

/// A row of `usage_windows`, its columns as [`WindowReader`] wants them.
pub(super) struct WindowCells<'r> {
    pub row: &'r Row<'r>,
    pub digests: &'r Digests,
}

impl Cells for WindowCells<'_> {
    fn place(&self, column: &str) -> Option<usize> {
        self.row.place(column)
    }

    fn cell_at(&self, place: usize) -> Result<Option<Cow<'_, str>>> {
        if !WindowReader::DIGESTS.contains(&place) {
            return self.row.cell_at(place);
        }
        match self.row.get_ref(place)? {
            ValueRef::Integer(number) => Ok(Some(self.digests.text(number))),
            _ => self.row.cell_at(place),
        }
    }

    fn integer_at(&self, place: usize) -> Result<Option<i64>> {
        self.row.integer_at(place)
    }
}

/// Numbers of digests, while rows are written; new digests are added.
pub(super) struct Numbers<'t> {
    insert: Statement<'t>,
    known: FxHashMap<Text, i64>,
    last: Option<(Arc<Basis>, [i64; 4])>,
}

impl<'t> Numbers<'t> {
    pub fn load(transaction: &'t Transaction<'_>) -> Result<Self> {
        let known = Digests::load(transaction)?.0.into_iter().map(|(number, digest)| (Text::from(digest), number));
        let insert = transaction.prepare("INSERT INTO definition_digests (digest) VALUES (?1)")?;
        Ok(Numbers { insert, known: known.collect(), last: None })
    }

    /// The numbers of rows, and how many rows in a row have them.
    pub fn of_all<'b>(&mut self, rows: impl Iterator<Item = &'b Arc<Basis>>) -> Result<Vec<([i64; 4], usize)>> {
        let mut all: Vec<([i64; 4], usize)> = Vec::new();
        for basis in rows {
            let numbers = self.of(basis)?;
            match all.last_mut() {
                Some((last, rows)) if *last == numbers => *rows += 1,
                _ => all.push((numbers, 1)),
            }
        }
        Ok(all)
    }

    /// In the order of [`WindowReader::DIGESTS`].
    fn of(&mut self, basis: &Arc<Basis>) -> Result<[i64; 4]> {
        if let Some((last, numbers)) = &self.last
            && Arc::ptr_eq(last, basis)
        {
            return Ok(*numbers);
        }
        let Basis { meter, price, subscription, customer } = &**basis;
        let numbers = [self.number(meter)?, self.number(price)?, self.number(subscription)?, self.number(customer)?];
        self.last = Some((Arc::clone(basis), numbers));
        Ok(numbers)
    }

    fn number(&mut self, digest: &Text) -> Result<i64> {
        if let Some(number) = self.known.get(digest) {
            return Ok(*number);
        }
        let number = self.insert.insert([digest])?;
        self.known.insert(Text::clone(digest), number);
        Ok(number)
    }
}
