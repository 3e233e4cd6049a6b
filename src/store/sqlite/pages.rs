//! B-trees in SQLite's file format (<https://www.sqlite.org/fileformat2.html>), made from rows
//! that are sorted: each page is made once, when it is full, and is never searched or split.
//! Pages go into the database by the virtual table `sqlite_dbpage`, so within a transaction,
//! with SQLite's own journal and locks.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context as _, Result, anyhow, bail};
use rusqlite::{Transaction, params};

use super::record::push_varint;

/// Where a page has how many pages its database has.
const PAGE_COUNT: std::ops::Range<usize> = 28..32;
/// Where it has how many bytes at the end of each page are not SQLite's.
const RESERVED: usize = 20;

/// SQLite locks bytes from here on: the page that has the first of them is never used.
const LOCKED_BYTE: u64 = 1 << 30;

/// The part of a page of rows by key that is left free: rows come later in their midst, one a
/// window and billing period, and should not split every page on the first day. PostgreSQL leaves
/// as much (fillfactor 90).
const FREE: usize = 10;

/// Rows that a page has in any case.
const LEAST_ROWS: usize = 4;

/// Pages that wait to be written.
const WAITING: usize = 64;

/// What there is to know of the pages of a database.
#[derive(Debug)]
pub(super) struct PageFormat {
    /// Bytes of a page.
    size: usize,
    /// Those of them that SQLite uses.
    usable: usize,
}

/// New pages of a database, from one of the threads that make them.
pub(super) struct Pages<'p> {
    format: &'p PageFormat,
    last: &'p AtomicU32,
    made: SyncSender<(u32, Vec<u8>)>,
}

impl Pages<'_> {
    fn next(&self) -> Result<u32> {
        loop {
            let before = self.last.fetch_add(1, Ordering::Relaxed);
            let number = before.checked_add(1).context("the store has no room for more pages")?;
            if u64::from(before) * self.format.size as u64 != LOCKED_BYTE {
                return Ok(number);
            }
        }
    }

    fn write(&self, page: u32, content: Vec<u8>) -> Result<()> {
        self.made.send((page, content)).map_err(|_| anyhow!("the store takes no more pages"))
    }

    /// Puts what a row has too much into pages of its own; the number of the first one.
    fn overflow(&self, rest: &[u8]) -> Result<u32> {
        let first = self.next()?;
        let mut page = first;
        let mut parts = rest.chunks(self.format.usable - 4).peekable();
        while let Some(part) = parts.next() {
            let next = if parts.peek().is_some() { self.next()? } else { 0 };
            let mut content = next.to_be_bytes().to_vec();
            content.extend_from_slice(part);
            content.resize(self.format.size, 0);
            self.write(page, content)?;
            page = next;
        }
        Ok(first)
    }
}

/// Pages behind the last one of a database, from several threads. The transaction can write
/// nothing else while it does this, and is to end then: SQLite itself knows of these pages only
/// after it.
pub(super) struct PageWriter<'t, 'c> {
    transaction: &'t mut Transaction<'c>,
    first: Vec<u8>,
    format: PageFormat,
    last: AtomicU32,
}

impl<'t, 'c> PageWriter<'t, 'c> {
    /// Whether this SQLite can write pages, need not know what is in each of them, and has texts as
    /// they are here.
    ///
    /// # Errors
    /// Where the database cannot be read.
    pub fn is_possible(transaction: &Transaction<'_>) -> Result<bool> {
        let able = "SELECT EXISTS (SELECT 1 FROM pragma_compile_options WHERE compile_options = 'ENABLE_DBPAGE_VTAB')";
        let is_able: bool = transaction.query_row(able, [], |row| row.get(0))?;
        let auto_vacuum: i64 = transaction.pragma_query_value(None, "auto_vacuum", |row| row.get(0))?;
        let encoding: String = transaction.pragma_query_value(None, "encoding", |row| row.get(0))?;
        Ok(is_able && auto_vacuum == 0 && encoding == "UTF-8")
    }

    /// # Errors
    /// Where the database cannot be read.
    pub fn new(transaction: &'t mut Transaction<'c>) -> Result<Self> {
        let first = "SELECT data FROM sqlite_dbpage WHERE pgno = 1";
        let first: Vec<u8> = transaction.query_row(first, [], |row| row.get(0))?;
        let reserved = first.get(RESERVED).copied().context("the first page of the store breaks off")?;
        let last: u32 = transaction.pragma_query_value(None, "page_count", |row| row.get(0))?;
        Ok(PageWriter {
            transaction,
            format: PageFormat { size: first.len(), usable: first.len() - usize::from(reserved) },
            first,
            last: AtomicU32::new(last),
        })
    }

    pub fn transaction(&self) -> &Transaction<'c> {
        self.transaction
    }

    /// Writes the pages that `makers` make, each on a thread of its own.
    ///
    /// # Errors
    /// Where one of them fails, or a page cannot be written.
    pub fn write<F: FnOnce(&Pages<'_>) -> Result<()> + Send>(self, makers: impl IntoIterator<Item = F>) -> Result<()> {
        let mut statement = self.transaction.prepare("INSERT INTO sqlite_dbpage (pgno, data) VALUES (?1, ?2)")?;
        std::thread::scope(|scope| {
            let (sender, made) = sync_channel(WAITING);
            let start = |make: F| {
                let pages = Pages { format: &self.format, last: &self.last, made: sender.clone() };
                scope.spawn(move || make(&pages))
            };
            let threads: Vec<_> = makers.into_iter().map(start).collect();
            drop(sender);
            // Where one cannot be written, the other threads find the channel closed.
            let write = |(page, content): (u32, Vec<u8>)| Ok(statement.execute(params![page, content]).map(drop)?);
            let written: Result<()> = made.into_iter().try_for_each(write);
            let panicked = |_| anyhow!("a thread that makes pages panicked: this is a bug in trueup");
            let made: Vec<Result<()>> = threads.into_iter().map(|thread| thread.join().map_err(panicked)?).collect();
            made.into_iter().fold(written, Result::and)
        })?;
        // The first page says how many there are.
        let mut first = self.first;
        let count = first.get_mut(PAGE_COUNT).context("the first page of the store breaks off")?;
        count.copy_from_slice(&self.last.into_inner().to_be_bytes());
        statement.execute(params![1, first])?;
        Ok(())
    }
}

/// How the rows of a table lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// By their number.
    Rowid,
    /// By their key, as `WITHOUT ROWID` has it: all pages have rows.
    Key,
}

/// Pages of one level of a tree: leaves have rows, others have the numbers of pages of the level
/// below and what separates these.
#[derive(Debug, Default)]
struct Level {
    /// Of the page that is being filled.
    cells: Vec<u8>,
    /// Where each of them ends.
    ends: Vec<usize>,
    /// What did not fit any more: it separates this page from the next one, if there is one.
    separator: Option<Cell>,
}

/// A row or a separator. That of a page above leaves begins with the number of the page that
/// comes before it.
#[derive(Debug)]
struct Cell {
    child: Option<u32>,
    rest: Vec<u8>,
}

/// A table that is being filled.
#[derive(Debug)]
pub(super) struct Tree {
    layout: Layout,
    levels: Vec<Level>,
    last_rowid: Option<i64>,
    cell: Vec<u8>,
}

impl Tree {
    pub fn new(layout: Layout) -> Self {
        Tree { layout, levels: vec![Level::default()], last_rowid: None, cell: Vec::new() }
    }

    /// Adds a row whose key comes after those of all rows so far. `rowid` counts where the layout
    /// has it.
    ///
    /// # Errors
    /// Where a page cannot be written.
    pub fn add(&mut self, pages: &Pages<'_>, rowid: i64, record: &[u8]) -> Result<()> {
        let mut cell = std::mem::take(&mut self.cell);
        cell.clear();
        push_varint(&mut cell, record.len() as u64);
        if self.layout == Layout::Rowid {
            push_varint(&mut cell, u64::from_ne_bytes(rowid.to_ne_bytes()));
        }
        let (local, rest) = record.split_at(self.local(pages.format.usable, record.len()));
        cell.extend_from_slice(local);
        if !rest.is_empty() {
            cell.extend_from_slice(&pages.overflow(rest)?.to_be_bytes());
        }
        let separator = self.last_rowid.replace(rowid).filter(|_| self.layout == Layout::Rowid);
        if let Some(last) = separator
            && !self.has_room(pages, 0, cell.len())?
        {
            // Rows by number are in leaves alone: numbers separate them.
            let page = pages.next()?;
            self.write(pages, 0, page, None)?;
            let mut rest = Vec::new();
            push_varint(&mut rest, u64::from_ne_bytes(last.to_ne_bytes()));
            self.push(pages, 1, Cell { child: Some(page), rest })?;
        }
        if self.level(0)?.separator.is_none() && self.has_room(pages, 0, cell.len())? {
            self.level(0)?.add(None, &cell);
        } else {
            self.push(pages, 0, Cell { child: None, rest: cell.clone() })?;
        }
        self.cell = cell;
        Ok(())
    }

    /// How many bytes of a row are in its page.
    fn local(&self, usable: usize, length: usize) -> usize {
        let most = match self.layout {
            Layout::Rowid => usable - 35,
            Layout::Key => (usable - 12) * 64 / 255 - 23,
        };
        if length <= most {
            return length;
        }
        let least = (usable - 12) * 32 / 255 - 23;
        let fitting = least + (length - least) % (usable - 4);
        if fitting <= most { fitting } else { least }
    }

    fn level(&mut self, at: usize) -> Result<&mut Level> {
        if self.levels.len() == at {
            self.levels.push(Level::default());
        }
        self.levels.get_mut(at).context("a level of a tree is missing: this is a bug in trueup")
    }

    fn push(&mut self, pages: &Pages<'_>, at: usize, cell: Cell) -> Result<()> {
        if let Some(separator) = self.level(at)?.separator.take() {
            let page = pages.next()?;
            self.write(pages, at, page, separator.child)?;
            self.push(pages, at + 1, Cell { child: Some(page), rest: separator.rest })?;
            self.level(at)?.add(cell.child, &cell.rest);
        } else if self.has_room(pages, at, cell.length())? {
            self.level(at)?.add(cell.child, &cell.rest);
        } else {
            self.level(at)?.separator = Some(cell);
        }
        Ok(())
    }

    /// Whether the page of a level is to have one more cell of a length.
    fn has_room(&mut self, pages: &Pages<'_>, at: usize, cell: usize) -> Result<bool> {
        let leaves_room = self.layout == Layout::Key && at == 0;
        let (level, usable) = (self.level(at)?, pages.format.usable);
        let free = if leaves_room && level.ends.len() >= LEAST_ROWS { usable / FREE } else { 0 };
        Ok(level.has_room(usable - free, cell))
    }

    /// Writes the page of a level that was filled, and begins the next one. `right` is the child
    /// that comes after all of its cells.
    fn write(&mut self, pages: &Pages<'_>, at: usize, number: u32, right: Option<u32>) -> Result<()> {
        let Some(level) = self.levels.get_mut(at) else { bail!("a level of a tree is missing: this is a bug in trueup") };
        let kind: u8 = match (self.layout, right) {
            (Layout::Rowid, None) => 0x0d,
            (Layout::Rowid, Some(_)) => 0x05,
            (Layout::Key, None) => 0x0a,
            (Layout::Key, Some(_)) => 0x02,
        };
        let begin = pages.format.usable - level.cells.len();
        let mut page = Vec::with_capacity(pages.format.size);
        page.extend([kind, 0, 0]);
        page.extend(u16::try_from(level.ends.len())?.to_be_bytes());
        // The largest pages of all, where they are empty: it is written as zero.
        page.extend(u16::try_from(begin).unwrap_or(0).to_be_bytes());
        page.push(0);
        page.extend(right.iter().flat_map(|right| right.to_be_bytes()));
        for start in std::iter::once(0).chain(level.ends.iter().copied()).take(level.ends.len()) {
            page.extend(u16::try_from(begin + start)?.to_be_bytes());
        }
        page.resize(begin, 0);
        page.extend_from_slice(&level.cells);
        page.resize(pages.format.size, 0);
        level.cells.clear();
        level.ends.clear();
        pages.write(number, page)
    }

    /// Writes what is left, the top of the tree to `root`.
    ///
    /// # Errors
    /// Where a page cannot be written.
    pub fn finish(mut self, pages: &Pages<'_>, root: u32) -> Result<()> {
        let (mut at, mut right) = (0, None);
        loop {
            // Nothing comes after the separator: one more page has it, and the last cell before
            // it separates the two.
            if let Some(separator) = self.level(at)?.separator.take() {
                let last =
                    self.level(at)?.pop(at > 0).ok_or_else(|| anyhow!("a page is full of nothing: this is a bug in trueup"))?;
                let page = pages.next()?;
                self.write(pages, at, page, last.child)?;
                self.push(pages, at + 1, Cell { child: Some(page), rest: last.rest })?;
                self.level(at)?.add(separator.child, &separator.rest);
            }
            if at + 1 == self.levels.len() {
                return self.write(pages, at, root, right);
            }
            let page = pages.next()?;
            self.write(pages, at, page, right)?;
            (at, right) = (at + 1, Some(page));
        }
    }
}

impl Cell {
    fn length(&self) -> usize {
        self.rest.len() + if self.child.is_some() { 4 } else { 0 }
    }
}

impl Level {
    fn has_room(&self, usable: usize, cell: usize) -> bool {
        // As pages above leaves have it; the header of leaves is four bytes shorter.
        12 + 2 * (self.ends.len() + 1) + self.cells.len() + cell <= usable
    }

    fn add(&mut self, child: Option<u32>, rest: &[u8]) {
        self.cells.extend(child.iter().flat_map(|child| child.to_be_bytes()));
        self.cells.extend_from_slice(rest);
        self.ends.push(self.cells.len());
    }

    /// Takes the last cell away.
    fn pop(&mut self, has_child: bool) -> Option<Cell> {
        self.ends.pop()?;
        let mut rest = self.cells.split_off(self.ends.last().copied().unwrap_or_default());
        let child = if has_child {
            let cell = rest.split_off(4);
            Some(u32::from_be_bytes(<[u8; 4]>::try_from(std::mem::replace(&mut rest, cell)).ok()?))
        } else {
            None
        };
        Some(Cell { child, rest })
    }
}
